"""Who may use the bridge, and what protects it on its way: TLS, certificates of both sides, a bearer token.

Everything is read from files, the token also from the environment, and none of it is ever printed or saved: a configuration
holds paths alone. The service shows `bridge.tls_cert`; with `bridge.tls_ca` too it takes only clients whose certificate that
authority signed. The learner speaks TLS where it has `bridge.tls_ca`, which must have signed the service's certificate, and
shows `bridge.tls_cert` where asked. Without TLS nothing but loopback addresses is used, unless the network is said to be
trusted.

Left out: passwords on key files and renewing certificates while a service runs (start it again; the others play meanwhile).
"""

from __future__ import annotations

import hmac
import ipaddress
import os
import socket
import ssl
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rollout.channel import OPTIONS, grpc, split_address
from rollout.errors import UserError

if TYPE_CHECKING:
    from sqlrl_jax.config_bridge import BridgeConfig

TOKEN_VARIABLE = "SQLRL_BRIDGE_TOKEN"
TOKEN_LENGTH = 16
PROBE_SECONDS = 2.0


@dataclass(frozen=True)
class Security:
    """One side's means, all PEM; `token` without line end. Empty: none."""

    certificate: bytes = b""
    key: bytes = field(default=b"", repr=False)
    authority: bytes = b""
    token: str = field(default="", repr=False)
    trusted_network: bool = False
    server_tls: ssl.SSLContext | None = field(default=None, repr=False, compare=False)
    """The same for sockets that are not gRPC's."""
    client_tls: ssl.SSLContext | None = field(default=None, repr=False, compare=False)

    @classmethod
    def load(cls, bridge: BridgeConfig) -> Security:
        """Reads what `bridge` names. Raises UserError naming the setting and file."""
        if bool(bridge.tls_cert) != bool(bridge.tls_key):
            raise UserError("bridge.tls_cert and bridge.tls_key belong together: a certificate and its key; set both")
        certificate, key = _read("bridge.tls_cert", bridge.tls_cert), _read("bridge.tls_key", bridge.tls_key)
        authority = _read("bridge.tls_ca", bridge.tls_ca)
        server_tls = _context(ssl.PROTOCOL_TLS_SERVER, bridge, authority) if certificate else None
        client_tls = _context(ssl.PROTOCOL_TLS_CLIENT, bridge, authority) if authority else None
        token = _token(bridge.token_file)
        return cls(certificate, key, authority, token, bridge.trusted_network, server_tls, client_tls)

    def on_loopback(self) -> Security:
        """What is used between a run and the services that it starts on its own machine: the token alone."""
        return replace(self, certificate=b"", key=b"", authority=b"", server_tls=None, client_tls=None)

    # The service's side.

    def require_allowed(self, listen: str) -> None:
        """Raises UserError unless a service may listen at `listen`."""
        protected = self.certificate and (self.token or self.authority)
        if is_loopback(listen) or protected or self.trusted_network:
            return
        raise UserError(
            f"bridge.listen {listen!r}: other machines reach this address, so the bridge must be encrypted and know its "
            f"learners: set bridge.tls_cert and bridge.tls_key, and bridge.token_file or bridge.tls_ca (docs/bridge.md). "
            f"Otherwise only loopback addresses are accepted: use 127.0.0.1:{split_address(listen)[1]} and a tunnel (ssh -L) "
            f"or bridge.trusted_network=true where only the run's own hosts reach the port"
        )

    def add_port(self, server: Any, listen: str) -> int:
        """Has a gRPC server listen; returns the port. Raises UserError, RuntimeError when the port is in use."""
        self.require_allowed(listen)
        if not self.certificate:
            return int(server.add_insecure_port(listen))
        pair = [(self.key, self.certificate)]
        return int(
            server.add_secure_port(
                listen, grpc.ssl_server_credentials(pair, self.authority or None, bool(self.authority))
            )
        )

    def admits(self, metadata: Sequence[tuple[str, str | bytes]]) -> str:
        """Empty when a call's metadata show the token, or none is asked for; otherwise why it is refused."""
        if not self.token:
            return ""
        given = [value for name, value in metadata if name == "authorization"]
        if not given:
            return "this service asks for a token; set bridge.token_file to the one that it has"
        shown = given[0].encode() if isinstance(given[0], str) else given[0]
        if not hmac.compare_digest(shown, f"Bearer {self.token}".encode()):
            return "this service has another token; bridge.token_file must hold the same on both sides"
        return ""

    # The learner's side.

    def metadata(self) -> tuple[tuple[str, str], ...]:
        """What goes with every call."""
        return (("authorization", f"Bearer {self.token}"),) if self.token else ()

    def channel(self, address: str, name: str = "") -> Any:
        """A channel to `address`, whose certificate must be `name`'s if given. Raises UserError before it shows the token."""
        if self.authority:
            credentials = grpc.ssl_channel_credentials(self.authority, self.key or None, self.certificate or None)
            named = ((("grpc.ssl_target_name_override", name),) if name else ()) + OPTIONS
            return grpc.secure_channel(address, credentials, options=named)
        if self.token and not self.trusted_network and not is_loopback(address):
            raise UserError(
                f"rollout service {address}: the token would be sent in clear; set bridge.tls_ca (and have the service use "
                f"TLS), or bridge.trusted_network=true where only the run's own hosts reach the port"
            )
        return grpc.insecure_channel(address, options=OPTIONS)

    def why_closed(self, address: str) -> str:
        """Why a service closed a connection at once, if TLS is why; otherwise empty. It is asked, for two seconds."""
        if not speaks_tls(address):
            return ""
        if not self.authority:
            return "it speaks TLS and this side does not; set bridge.tls_ca to the authority of its certificate"
        if not self.certificate:
            return "it asks for a certificate; set bridge.tls_cert and bridge.tls_key"
        return "it does not accept the certificate in bridge.tls_cert: its bridge.tls_ca has not signed it, or it has expired"


_SIGNS = (
    ("certificate has expired", "its certificate has expired; give it a new one and start it again"),
    ("certificate is not yet valid", "its certificate is not valid yet; compare the clocks"),
    ("Hostname Verification Check failed", "its certificate is for another name; use an address that it names"),
    ("CERTIFICATE_VERIFY_FAILED", "its certificate is not signed by bridge.tls_ca"),
    ("WRONG_VERSION_NUMBER", "it does not speak TLS; set its bridge.tls_cert, or leave bridge.tls_ca out"),
)


def why_unsafe(details: str) -> str:
    """What gRPC says of a handshake that failed, as a sentence; empty when it says nothing of one."""
    return next((meaning for sign, meaning in _SIGNS if sign in details), "")


PLAIN = Security()


def is_loopback(address: str) -> bool:
    """Whether `host:port` can be reached from this machine alone. Raises UserError when malformed."""
    host, _ = split_address(address)
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def speaks_tls(address: str) -> bool:
    """Whether the server there begins to shake hands; whom it trusts does not matter."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    context.set_alpn_protocols(["h2"])
    try:
        with socket.create_connection(split_address(address), PROBE_SECONDS) as connection:
            context.wrap_socket(connection).close()
    except OSError:
        return False
    return True


def _read(setting: str, path: str) -> bytes:
    if not path:
        return b""
    try:
        return Path(path).expanduser().read_bytes()
    except OSError as error:
        raise UserError(f"{setting} {path}: {error.strerror or error}") from None


def _context(protocol: int, bridge: BridgeConfig, authority: bytes) -> ssl.SSLContext:
    """One side's certificate and whom it trusts, both if there are any. Raises UserError naming the file."""
    context = ssl.SSLContext(protocol)
    if protocol == ssl.PROTOCOL_TLS_SERVER:
        context.num_tickets = 0  # nothing is sent but answers, so that whoever can read has one
    if bridge.tls_cert:
        certificate, key = Path(bridge.tls_cert).expanduser(), Path(bridge.tls_key).expanduser()
        try:
            context.load_cert_chain(certificate, key, password=lambda: b"")
        except (ssl.SSLError, ValueError) as error:
            what = (
                "do not belong together" if "MISMATCH" in str(error) else "are no certificate and open key in PEM form"
            )
            raise UserError(f"bridge.tls_cert {bridge.tls_cert} and bridge.tls_key {bridge.tls_key} {what}") from None
    if authority:
        context.verify_mode = ssl.CERT_REQUIRED
        try:
            context.load_verify_locations(cadata=authority.decode("ascii", "replace"))
        except (ssl.SSLError, ValueError):
            raise UserError(f"bridge.tls_ca {bridge.tls_ca}: this is no certificate in PEM form") from None
    return context


def _token(path: str) -> str:
    source = f"bridge.token_file {path}" if path else f"the environment's {TOKEN_VARIABLE}"
    text = _read("bridge.token_file", path).decode("utf-8", "replace") if path else os.environ.get(TOKEN_VARIABLE, "")
    token = text.strip()
    if not path and not token:
        return ""
    if len(token) < TOKEN_LENGTH or not token.isascii() or not token.isprintable() or " " in token:
        raise UserError(
            f"{source}: a token is one line of at least {TOKEN_LENGTH} ASCII characters without spaces; "
            f"make one with: openssl rand -hex 32"
        )
    return token
