"""The one importer of Comet's client: quiet, patching nothing, and asked for only when needed."""

import os
import ssl
import sys
import threading
import urllib.error
import urllib.request
from typing import Any

from capfinder import log
from capfinder.errors import StageFailedError

PROBE_SECONDS = 3.0
NO_KEY = (
    "there is no Comet API key. Set the environment variable COMET_API_KEY, or run `comet login`"
)
# Read by the client when it is imported: no patching of other libraries, no reports about us to
# its makers, nothing on the terminal (what it says goes to our log instead).
CLIENT_ENVIRONMENT = {
    "COMET_DISABLE_AUTO_LOGGING": "1",
    "COMET_ERROR_TRACKING_ENABLE": "0",
    "COMET_INTERNAL_REPORTING": "0",
    "COMET_DISABLE_ANNOUNCEMENT": "1",
    "COMET_LOGGING_CONSOLE": "CRITICAL",
}


class CometError(StageFailedError):
    """Comet can't be reached, refused, or answered what can't be understood."""


def import_client() -> Any:
    os.environ.update(CLIENT_ENVIRONMENT)
    hook = sys.excepthook
    import comet_ml

    sys.excepthook = hook  # the client puts its own there, which reports our errors
    return comet_ml


def api_key(comet: Any) -> str | None:
    """From COMET_API_KEY or any place the client knows (.comet.config, .env); from then on no log
    says it."""
    key = comet.get_api_key(None, comet.get_config()) or None
    log.hide(key)
    return key


def address(comet: Any) -> str:
    return comet.get_backend_address(comet.get_config())


def rest_client(key: str) -> Any:
    """The client's requests to the server, one method each; they end in time, unlike those of its
    LoggedArtifact.download, which has no timeout."""
    from comet_ml.connection.connection_factory import get_rest_api_client

    return get_rest_api_client("v2", api_key=key, use_cache=False, check_version=False)


def redacted(text: str, key: str | None) -> str:
    return text.replace(key, "***") if key else text


def is_reachable(url: str) -> bool:
    """Whether a server answers at `url`, whatever it answers; takes PROBE_SECONDS at most."""
    answered = threading.Event()

    def ask() -> None:
        try:
            urllib.request.urlopen(url, timeout=PROBE_SECONDS).close()
        except urllib.error.HTTPError:
            pass
        except urllib.error.URLError as error:
            if not isinstance(error.reason, ssl.SSLError):  # the client may know the certificate
                return
        except (OSError, ValueError):
            return
        answered.set()

    # A thread of its own: looking up a host's name has no time limit.
    asking = threading.Thread(target=ask, name="comet-probe", daemon=True)
    asking.start()
    asking.join(PROBE_SECONDS)
    return answered.is_set()
