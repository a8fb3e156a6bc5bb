"""Reject settings that look like secrets.

Settings are saved in config.yaml, the job's script and wandb's files, and shown in errors. A secret among them is
rejected before that, without repeating it. Programs that need a secret read it from the environment.
"""

import os
import re
from collections.abc import Mapping
from urllib.parse import urlsplit

NAME = re.compile(
    r"(?:.*[_.-])?(?:api_?key|access_?key|private_?key|secret|password|passwd|passphrase|token|credentials?"
    r"|authorization)",
    re.IGNORECASE,
)
"""Names of settings and environment variables that hold a secret; ``api_key_env`` and ``max_tokens`` do not match."""
KNOWN = re.compile(r"\b(?:hf_\w{30,}|sk-[\w-]{20,}|gh[pousr]_\w{30,}|github_pat_\w{30,}|AKIA[0-9A-Z]{16})")
"""Recognisable access tokens of Hugging Face, OpenAI, GitHub and AWS."""
LENGTH = 8
"""Minimum length of an environment variable's value to search for; shorter ones may be common words."""
SHELL = re.compile(r"\b(\w+)=['\"]?(?=[^$'\"\s])")
"""A shell assignment of anything but another variable."""


def _reason(key: str, value: str) -> str | None:
    name = key.rpartition(".")[2]
    if NAME.fullmatch(name) and value not in ("", "null"):
        return f"a key named {name} is for a secret"
    if KNOWN.search(value):
        return "its value is an access token"
    try:
        if urlsplit(value).password:
            return "its value is a URL with a password"
    except ValueError:  # not a URL
        pass
    for variable, secret in os.environ.items():
        if len(secret) >= LENGTH and secret in value and NAME.fullmatch(variable):
            return f"its value has that of the environment variable {variable}"
    return None


def check_secrets(settings: object, key: str) -> None:
    """Raise ValueError, naming the key and not the value, for the first setting that looks like a secret."""
    if isinstance(settings, Mapping):
        for name, value in settings.items():
            check_secrets(value, f"{key}.{name}".lstrip("."))
    elif isinstance(settings, list | tuple):
        for value in settings:
            check_secrets(value, key)
    elif isinstance(settings, str) and (reason := _reason(key, settings)):
        raise ValueError(f"{key}: {reason}, and settings are written down: expected it in the environment alone")


def check_shell(key: str, code: str) -> None:
    """Raise ValueError if shell code contains a secret, or assigns one to a variable."""
    check_secrets(code, key)
    for name in SHELL.findall(code):
        if NAME.fullmatch(name):
            raise ValueError(f"{key} sets {name}, and is written down: expected a file of yours that it sources")
