"""What goes wrong between here and a Hugging Face hub, each as one sentence that says what to do."""

from __future__ import annotations

from dataclasses import dataclass

import httpx2
from huggingface_hub import constants
from huggingface_hub.errors import (
    DisabledRepoError,
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    OfflineModeIsEnabled,
    RemoteEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from rollout.errors import UserError

TOKEN = "set HF_TOKEN to a token that may read it (the hub's settings, Access Tokens)"


class DownloadError(UserError):
    """A file can't be had. The message names repository and file and says what to do."""


class Passing(Exception):
    """Trouble that another try may not meet."""


@dataclass(frozen=True)
class Source:
    """A file of a repository. `endpoint` is empty for the hub that the client is set to."""

    repo: str
    filename: str
    kind: str
    revision: str | None
    endpoint: str

    @property
    def name(self) -> str:
        return f"{self.kind} {self.repo}/{self.filename}"

    @property
    def host(self) -> str:
        return self.endpoint or constants.ENDPOINT

    def __str__(self) -> str:
        return f"{self.filename} of {self.kind} {self.repo}" + (f" at {self.revision}" if self.revision else "")


def explain(error: Exception, source: Source) -> tuple[str, bool, float | None]:
    """(sentence, whether another try may help, seconds the hub asks to wait)."""
    if isinstance(error, HfHubHTTPError):
        text, passing, wait = _status(error, source)
    elif isinstance(error, Passing):
        text, passing, wait = str(error), True, None
    else:
        text, passing = _connection(error, source)
        wait = None
    return f"{source}: {text}", passing, wait


def _status(error: HfHubHTTPError, source: Source) -> tuple[str, bool, float | None]:
    """An answer of the hub, or of the storage that it redirects to."""
    status = error.response.status_code
    page = f"{source.host}/{'datasets/' if source.kind == 'dataset' else ''}{source.repo}"
    if isinstance(error, GatedRepoError):
        return f"access is granted by its owner: accept the terms at {page} and {TOKEN}", False, None
    if isinstance(error, RevisionNotFoundError):
        return f"{source.host} has no such revision; look at {page}", False, None
    if isinstance(error, RemoteEntryNotFoundError):
        return f"{source.host} has no such file there; look at {page}", False, None
    if isinstance(error, DisabledRepoError):
        return "the hub has disabled this repository", False, None
    if isinstance(error, RepositoryNotFoundError) or status == 404:
        return f"{source.host} has no such {source.kind}, or it is private: check the name, or {TOKEN}", False, None
    if status in (408, 429) or status >= 500:
        busy = "asks to slow down" if status == 429 else "is in trouble"
        text = f"{source.host} {busy} (HTTP {status}); run again later, what has come is kept"
        return text, True, _retry_after(error.response)
    if status == 401:
        return f"{source.host} does not accept the token (HTTP 401): {TOKEN}, or unset HF_TOKEN", False, None
    if status == 403:
        # Behind a redirect it is the storage, whose signed address may have expired: the next try gets a new one.
        elsewhere = bool(error.response.history)
        return f"no access (HTTP 403): look at {page} and {TOKEN}", elsewhere, None
    return f"{source.host} answered HTTP {status}; look at {page}", False, None


def _retry_after(response: httpx2.Response) -> float | None:
    value = response.headers.get("Retry-After", "")
    return float(value) if value.isdecimal() else None


def _connection(error: Exception, source: Source) -> tuple[str, bool]:
    """No answer at all, or one that broke off."""
    host = source.host
    if isinstance(error, HFValidationError):
        return "not a repository's name; expected owner/name", False
    if isinstance(error, OfflineModeIsEnabled):
        return "HF_HUB_OFFLINE is set; unset it, or put the file in place by hand", False
    if isinstance(error, httpx2.UnsupportedProtocol | httpx2.InvalidURL):
        return f"{host} is no address; HF_ENDPOINT should look like https://huggingface.co", False
    if isinstance(error, httpx2.TooManyRedirects):
        return f"{host} redirects in circles; is HF_ENDPOINT a hub?", False
    if isinstance(error, httpx2.ProxyError):
        return f"the proxy refuses ({error}); check HTTPS_PROXY", False
    if isinstance(error, httpx2.TimeoutException):
        return f"{host} does not answer; check the network, and HF_ENDPOINT if it is set", True
    if isinstance(error, httpx2.ConnectError):
        if "CERTIFICATE" in str(error).upper():
            return (
                f"the certificate of {host} is not trusted ({error}); set SSL_CERT_FILE to your organisation's",
                False,
            )
        return f"no connection to {host} ({error}); check the network, proxy (HTTPS_PROXY) and HF_ENDPOINT", True
    return f"the connection to {host} broke ({error or type(error).__name__}); run again to continue", True
