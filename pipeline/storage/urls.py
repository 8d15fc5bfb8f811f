"""Secrets in URLs: a user and password, or the signature of a pre-signed URL.

A command takes them out of its configuration before anything else reads it, so that they are in no name, file or
message. `locate` adds them again. The identity of a shard therefore does not change with its signature.
"""

import base64
import re
from typing import Any
from urllib.parse import unquote

HIDDEN = "***"
# A bucket's name has no colon, but a secret key may have slashes.
USER = re.compile(r"(?<=://)(?:(?<=s3://)|(?<=s3a://))[^\s/:@]+:[^\s@]+@|(?<=://)[^\s/?#:@]*:[^\s/?#]*@")
SIGNATURES = {"x-amz-signature", "x-goog-signature", "signature", "sig"}
# All parameters that come with a signature: of AWS and Google, of CloudFront, and of Azure
SIGNED = re.compile(
    r"x-(amz|goog)-.*|awsaccesskeyid|googleaccessid|signature|expires|policy|key-pair-id|"
    r"sig?|s[vspretd]|srt|spr|sip|sdd|sk[tesv]|skoid|sktid|saoid|suoid|scid",
    re.IGNORECASE,
)
SECRET = re.compile(
    r"x-(amz|goog)-(signature|credential|security-token)|awsaccesskeyid|signature|sig|policy|"
    r"(access_?|auth_?)?token|api_?key|password|secret",
    re.IGNORECASE,
)
PARAMETER = re.compile(r"([?&])([\w.-]+)=([^&\s'\"<>)]*)")


def without_secrets(url: str) -> tuple[str, dict[str, str]]:
    """The URL without its secrets, and the secrets by what they open: a server or bucket, or one URL.

    url: may be a pattern with braces or a glob. Other text is returned as it is.
    """
    if "://" not in url:
        return url, {}
    secrets = {}
    if user := USER.search(url):
        url = url[: user.start()] + url[user.end() :]
        secrets[_server(url)] = user[0].removesuffix("@")
    place, _, query = url.partition("?")
    if query and _last(url).startswith("http"):
        kept, hidden = _sorted_out(query.split("&"))
        if hidden:
            url = f"{place}?{'&'.join(kept)}" if kept else place
            secrets[url] = "&".join(hidden)
    return url, secrets


def with_secrets(url: str, secrets: dict[str, str]) -> tuple[str, dict[str, Any]]:
    """The inverse: the URL to open, and options for its file system."""
    options: dict[str, Any] = {}
    if (user := secrets.get(_server(url))) is not None:
        protocol = _last(url).partition("://")[0]
        options = _login(protocol, *map(unquote, user.split(":", 1)))
        options = {protocol: options} if "::" in url else options
    if query := secrets.get(url):
        url += ("&" if "?" in url else "?") + query
    return url, options


def _sorted_out(parameters: list[str]) -> tuple[list[str], list[str]]:
    """The parameters of a query that are not secret, and those that are, with all that belong to a signature."""
    names = [parameter.partition("=")[0] for parameter in parameters]
    signed = any(name.lower() in SIGNATURES for name in names)
    secret = [bool(SECRET.fullmatch(name) or (signed and SIGNED.fullmatch(name))) for name in names]
    pairs = list(zip(parameters, secret, strict=True))
    return [one for one, hide in pairs if not hide], [one for one, hide in pairs if hide]


def redacted(text: str) -> str:
    """Text, such as an error of a library, with the secrets of the URLs in it hidden."""
    if "://" not in text:
        return text
    text = USER.sub(f"{HIDDEN}@", text)
    return PARAMETER.sub(lambda one: f"{one[1]}{one[2]}={HIDDEN}" if SECRET.fullmatch(one[2]) else one[0], text)


def _last(url: str) -> str:
    """The URL of the file that is on a server: a.zip in zip://x.tar::https://host/a.zip."""
    return url.rpartition("::")[2]


def _server(url: str) -> str:
    """Scheme and host, or scheme and bucket."""
    scheme, _, rest = _last(url).partition("://")
    return f"{scheme}://{re.split('[/?#]', rest, maxsplit=1)[0]}"


def _login(protocol: str, user: str, password: str) -> dict[str, Any]:
    if protocol in ("http", "https"):
        basic = base64.b64encode(f"{user}:{password}".encode()).decode()
        return {"client_kwargs": {"headers": {"Authorization": f"Basic {basic}"}}}
    if protocol in ("s3", "s3a"):
        return {"key": user, "secret": password}
    return {"username": user, "password": password}
