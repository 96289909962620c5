"""The settings of the bridge between learner and rollout services, under `bridge`. Both sides read them."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from sqlrl_jax.config_base import Section


class BridgeConfig(Section):
    listen: str = "127.0.0.1:0"
    """Where `launch.py serve` listens; port 0 takes a free one. Others than loopback need TLS and a token or tls_ca."""
    data_port: int = Field(0, ge=0, le=65535)
    """Port of a service, beside that of `listen`, for the bytes of weights; 0 takes a free one. Where it is not reached
    they go through `listen`'s, more slowly."""
    tls_cert: str = ""
    """PEM file of this side's certificate: a service with one speaks TLS, a learner shows it where asked."""
    tls_key: str = ""
    """PEM file of its key, without a password."""
    tls_ca: str = ""
    """PEM file of who signs the other side's certificates: a learner with one speaks TLS, a service asks for certificates."""
    token_file: str = ""
    """File with the token that every call must show, the same on both sides; empty: from SQLRL_BRIDGE_TOKEN if set."""
    trusted_network: bool = False
    """Listen on addresses that other machines reach, neither encrypted nor authenticated: only in a private network."""
    start_timeout: float = Field(180.0, gt=0)
    """Seconds a rollout service may take to start."""
    push_timeout: float = Field(300.0, gt=0)
    """Seconds one transfer of weights may take."""
    delta: Literal["auto", "off"] = "auto"
    """auto: pushes send differences from the last version where those are small; the learner's hosts keep that version in
    memory, each the part it owns. off: every push sends everything, and nothing is kept."""
    probe_sequences: int = Field(4, ge=0)
    """Sequences whose log-probabilities a service must give as the learner does before new weights are live; 0: no check."""
    probe_tolerance: float | None = Field(None, gt=0)
    """Largest mean difference in them, nats a token. Not given: 0.001 in float32, 0.5 with bfloat16, 1 quantized."""
    stall_timeout: float = Field(300.0, gt=0)
    """Seconds without a finished episode or a new token after which a service counts as dead."""
    drain_timeout: float = Field(20.0, ge=0)
    """Seconds that a rollout service which was told to stop plays on; what is not finished then is handed back."""
    max_restarts: int = Field(3, ge=0)
    """Times that each rollout service may be lost without a finished batch in between."""
