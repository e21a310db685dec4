"""Takes private things out of a text that is made public, such as a report of a problem.

There is one rule, and it is about the finished text, so that it does not matter who wrote which line: what is not
known to say nothing about a user is replaced. The same thing gets the same placeholder each time, and the end of a path
stays if it is made of common words: `/home/anna/acme/runs/a` becomes `<home>/<path 1>/runs/a`.
"""

import contextlib
import dataclasses
import getpass
import ipaddress
import os
import platform
import pwd
import re
import socket
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path

_WORDS = """
aarch accel address agc all an any are area arm array arrayrecord augment auto backend batch batchnorm bench best
bfloat bias bicubic bilinear bin bn bucket build cache checkpoints cifar classes cli cnn code commit compiled conv
convert cosine cpu csv cubic cuda damaged darwin data dataset datasets debug default dev digits dm docs doctor eca
efficientnet ema email environment error eval events export eye false file files finetune flax float folder folders
for frozen gain gelu gitignore gpu gs head highest home host hosts http https image imagenet images in initial input
int is jax jaxlib jpeg jpg json jsonl kernel label labels lanczos layers learning lib linux local localhost log logs
lowest max mean metrics mine mnist mnt mode model models mount name names net newest nf nfnet none norm notes npz
null nvidia of off on ones opt optim orbax own owner parquet path photo photos pillow plugins png pretrained private
proc process profile profiles project py python raw recipe recipes regnet relu reports requested resnet root run
runs safetensors scale secret seresnet shards shm silu skip src stages state std stdout stem sum swap synthetic sys
tar temporary tensorboard tensorflow test tests text tfds tfrecord the timm tmp to token top tpu trackers train true
tune type unknown url user usr val validation value var venv vfio webdataset weights wide work workdir xla zero
zeros zip
"""
_PUBLIC = frozenset(_WORDS.split())
"""Words that say nothing about a user: names of files that runs consist of, of networks, of usual folders."""
_INSTRUCTIONS = re.compile(r"(?:sse|ssse|avx|amx|vaes|vpclmul|fma|f16c|gfni|bmi|popcnt|asimd|sve|sme|bf16|i8mm)\w*")
_FLAG = re.compile(r"--(?:xla|tpu|libtpu)_\w+(?:=(?:true|false|-?[\d.]+))?(?=\s|$)", re.IGNORECASE)
_EXTRA = re.compile(r"nfnet_flax\[[a-z0-9,-]+\]")
_TIME = re.compile(r"\d{8}T\d{6}Z(?:-(?=[a-f]*\d)[0-9a-f]{8})?")
"""Beginning of the name of a log: the time and a random number."""
_SECRET_NAME = re.compile(r"TOKEN|SECRET|PASS(?:WORD|WD|PHRASE)|CREDENTIAL|_KEY|APIKEY|PRIVATE", re.IGNORECASE)
"""What is in the names of environment variables that hold secrets."""
_MIN_SECRET, _MIN_NAME = 6, 4
"""Shortest secret, and shortest part of a path, that is searched in the whole text: shorter ones are in other words."""
_OPEN, _CLOSE = "\ue000", "\ue001"
"""Around the number of a placeholder while a text is being changed; Unicode has these characters for private use."""

_QUOTED = re.compile(r"(?:(?<!\w)|(?<=\bb))(['\"`])([^'\"`\n]*)\1(?!\w)")
_URL = re.compile(r"([a-zA-Z][\w+.-]*)://([^\s'\"`<>|\ue000\ue001]*)")
_EMAIL = re.compile(r"[\w.+-]+@[\w.-]*\w")
_PATH = re.compile(
    r"(?<![^\s'\"`<>|=(\[,;:])(?:/|[^\s'\"`<>|=/\ue000\ue001(]+/)(?:[^\s'\"`<>|\ue000\ue001]*[^\s'\"`<>|\ue000\ue001.,;:])?"
)
_FILE = re.compile(
    r"([\w.+-]*\w)(\.(?:py|jsonl?|jpe?g|png|gif|webp|bmp|tiff?|csv|tsv|parquet|tar|arrayrecord|array_record|safetensors"
    r"|npz|npy|txt|ya?ml|toml|log|ipynb|zip|gz))\b",
    re.IGNORECASE,
)
_TOKEN = re.compile(
    r"\b(?:hf_|gh[pousr]_|github_pat_|glpat-|sk-|xox\w-|AKIA|ASIA|AIza|ya29\.|eyJ)[\w.-]{8,}"
    r"|\b[0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12}\b|\b[0-9a-fA-F]{32,}\b"
    r"|(?<![\w-])(?=[\w-]*\d)(?=[\w-]*[a-z])(?=[\w-]*[A-Z])[\w-]{20,}(?![\w-])"
)
_GIVEN_SECRET = re.compile(r"(?i)(\b[\w-]*(?:token|secret|passw(?:or)?d|api[_-]?key|credential)[\w-]*\s*[=:]\s*)(\S+)")
_ADDRESS = re.compile(
    r"(?<![\w.:])(?:\d{1,3}(?:\.\d{1,3}){3}(?!\w)|[0-9a-fA-F:]*:[0-9a-fA-F:.]*:[0-9a-fA-F.]*(?![\w:]))"
)
_MAC = re.compile(r"\b[0-9a-fA-F]{2}(?:[:-][0-9a-fA-F]{2}){5}\b")
_DOMAIN = re.compile(
    r"\b[\w-]+(?:\.[\w-]+)*\.(?:com|org|net|edu|gov|io|ai|dev|cloud|internal|local|lan|corp|intra|home"
    r"|de|uk|fr|ch|at|nl|eu|us|cn|jp|au|ca|ru|kr|es|se|pl)\b(?![\w.(=-])"
)


def is_public(text: str) -> bool:
    """Whether a text consists of common words, numbers of at most ten digits, and single letters."""
    text = _EXTRA.sub(" ", _TIME.sub(" ", _FLAG.sub(" ", text)))
    return all(map(_is_public_word, re.split(r"[\W_]+", text)))


def _is_public_word(word: str) -> bool:
    letters = word.rstrip("0123456789").lower()
    if len(word) - len(letters) > 10:
        return False
    return len(letters) <= 1 or letters in _PUBLIC or _INSTRUCTIONS.fullmatch(word.lower()) is not None


def without_private(
    text: str, *, places: Sequence[str] = (), names: Sequence[str] = (), keep: Collection[str] = ()
) -> str:
    """A text without what says who and where somebody is, or opens something.

    Replaced are, by placeholders such as `<path 1>`: the user's home folder, user and host names, paths, URLs and
    buckets, e-mail addresses, addresses of networks, tokens, names of files, and whatever stands in quotes, as the
    values of fields do in messages. What consists of common words stays (`is_public`). This errs on the side of
    replacing too much; still, nobody can promise that it finds everything, so a reader should look at the result.

    Args:
      text: any text.
      places: paths that the user gave; they may contain spaces. Their parts are replaced in other places, too.
      names: other texts that the user chose, such as the name of a recipe.
      keep: what is public although it does not look so: versions that look like addresses of networks, and words that
        may stand in quotes, such as names of fields.
    """
    return _Rule(places, names, keep).applied(text)


@dataclasses.dataclass(frozen=True)
class _Rule:
    places: Sequence[str]
    names: Sequence[str]
    keep: Collection[str]
    _numbers: dict[str, dict[str, int]] = dataclasses.field(default_factory=dict)
    _placeholders: list[str] = dataclasses.field(default_factory=list)

    def applied(self, text: str) -> str:
        text = text.replace(_OPEN, "").replace(_CLOSE, "")
        for secret in sorted(_secrets(), key=len, reverse=True):
            text = text.replace(secret, self._hold("<token>"))
        for place in sorted({*_homes(), *self._given()}, key=len, reverse=True):
            text = re.sub(rf"(?<![\w/]){re.escape(place)}(?:/[^\s'\"`<>|]*)?(?!\w)", self._path_found, text)
        text = _QUOTED.sub(self._quoted, text)
        text = _URL.sub(lambda found: self._url(found[0]), text)
        text = _EMAIL.sub(lambda found: self._numbered("e-mail", found[0]), text)
        text = _PATH.sub(self._path_found, text)
        text = _GIVEN_SECRET.sub(lambda found: found[1] + self._unless_public("token", found[2]), text)
        text = _TOKEN.sub(lambda found: found[0] if is_public(found[0]) else self._hold("<token>"), text)
        text = _MAC.sub(lambda found: self._numbered("address", found[0]), text)
        text = _ADDRESS.sub(self._address, text)
        text = self._without_words(text)
        text = _FILE.sub(lambda found: self._unless_public("name", found[1]) + found[2], text)
        text = _DOMAIN.sub(self._domain, text)
        return re.sub(f"{_OPEN}(\\d+){_CLOSE}", lambda found: self._placeholders[int(found[1])], text)

    def _hold(self, placeholder: str) -> str:
        """What stands for a placeholder until the end, so that no later part of the rule changes it."""
        self._placeholders.append(placeholder)
        return f"{_OPEN}{len(self._placeholders) - 1}{_CLOSE}"

    def _numbered(self, kind: str, value: str) -> str:
        return self._hold(f"<{kind} {self._number(kind, value)}>")

    def _number(self, kind: str, value: str) -> int:
        known = self._numbers.setdefault(kind, {})
        return known.setdefault(value, len(known) + 1)

    def _unless_public(self, kind: str, value: str) -> str:
        return value if _OPEN in value or is_public(value) else self._numbered(kind, value)

    def _given(self) -> Iterator[str]:
        for place in self.places:
            if "://" in place:
                yield place
            elif len(Path(place).parts) > 1:
                yield place
                with contextlib.suppress(OSError, RuntimeError):
                    yield str(Path(place).expanduser().resolve())

    def _quoted(self, found: re.Match[str]) -> str:
        mark, text = found[1], found[2]
        if "://" in text and " " not in text:
            text = self._url(text)
        elif text.startswith(("/", "~/")):
            text = self._path(text)
        elif text not in self.keep and not is_public(re.sub(f"{_OPEN}\\d+{_CLOSE}", "", text)):
            text = self._numbered("text", text)
        return f"{mark}{text}{mark}"

    def _url(self, url: str) -> str:
        end = len(url.rstrip(".,;:)]"))
        kind, _, rest = url[:end].partition("://")
        if kind.lower() not in ("gs", "s3"):
            return self._numbered("url", url[:end]) + url[end:]
        bucket, slash, key = rest.partition("/")
        shown = f"{kind}://<bucket {self._number('bucket', bucket)}>{slash}" if bucket else f"{kind}://"
        return self._hold(shown + (self._relative(key, bucket) if key else "")) + url[end:]

    def _path_found(self, found: re.Match[str]) -> str:
        path = found[0]
        end = len(path.rstrip(".,;:"))
        if ")" in path and "(" not in path:
            end = path.index(")")
        return (self._url(path[:end]) if "://" in path else self._path(path[:end])) + path[end:]

    def _path(self, path: str) -> str:
        home = next((home for home in _homes() if f"{path}/".startswith(f"{home}/")), None)
        if home is not None or path.startswith("~/"):
            rest = path[1 if home is None else len(home) :].lstrip("/")
            return self._hold("<home>" + (f"/{self._relative(rest, '<home>')}" if rest else ""))
        is_absolute = path.startswith("/")
        shown = self._relative(path.lstrip("/"), "/" if is_absolute else "")
        return self._hold(f"/{shown}" if is_absolute and not shown.startswith("<") else shown)

    def _relative(self, path: str, place: str) -> str:
        """A path below `place`: everything up to its last private name is one placeholder."""
        parts = path.split("/")
        last = max((index for index, part in enumerate(parts) if not is_public(part)), default=-1)
        if last < 0:
            return path
        hidden = "/".join([place, *parts[: last + 1]])
        return "/".join([f"<path {self._number('path', hidden)}>", *parts[last + 1 :]])

    def _address(self, found: re.Match[str]) -> str:
        text = found[0].rstrip(".")
        try:
            address = ipaddress.ip_address(text)
        except ValueError:
            return found[0]
        if text in self.keep or address.is_loopback or address.is_unspecified:
            return found[0]
        return self._numbered("address", text) + found[0][len(text) :]

    def _domain(self, found: re.Match[str]) -> str:
        return self._unless_public("host", found[0])

    def _without_words(self, text: str) -> str:
        """Replaces names where they stand alone: those of users and hosts also in parts of longer names."""
        hosts = {part for host in _hosts() for part in (host, host.partition(".")[0])}
        words = [(user, "user", r"[^\W\d_]") for user in _users()] + [(host, "host", r"[^\W\d_]") for host in hosts]
        parts = {part for place in self.places for part in re.split(r"[/:=,]+", place)}
        parts |= {Path(part).stem for part in parts}
        words += [(name, "name", r"\w") for name in {*self.names, *(p for p in parts if len(p) >= _MIN_NAME)}]
        for word, kind, letter in sorted(words, key=lambda each: (-len(each[0]), each)):
            if word and not is_public(word):
                pattern = re.compile(rf"(?<!{letter}){re.escape(word)}(?!{letter})", re.IGNORECASE)
                if pattern.search(text):
                    text = pattern.sub(self._hold("<user>") if kind == "user" else self._numbered(kind, word), text)
        return text


def _secrets() -> set[str]:
    found = {value for name, value in os.environ.items() if _SECRET_NAME.search(name)}
    return {value for value in found if len(value) >= _MIN_SECRET and not is_public(value)}


def _homes() -> list[str]:
    """Names of the user's home folder, the longest first; `/`, which some containers have, hides nothing."""
    found = {os.environ.get("HOME", "")}
    with contextlib.suppress(KeyError):
        found.add(pwd.getpwuid(os.getuid()).pw_dir)
    found |= {os.path.realpath(home) for home in found if home}
    return sorted({home.rstrip("/") for home in found} - {""}, key=len, reverse=True)


def _users() -> set[str]:
    found = {os.environ.get(name, "") for name in ("USER", "LOGNAME", "USERNAME", "SUDO_USER")}
    with contextlib.suppress(KeyError, OSError):
        found |= {getpass.getuser(), pwd.getpwuid(os.getuid()).pw_name}
    return found - {""}


def _hosts() -> set[str]:
    variables = ("HOSTNAME", "HOST", "SLURMD_NODENAME", "MASTER_ADDR", "TPU_WORKER_HOSTNAMES")
    found = {name for variable in variables for name in os.environ.get(variable, "").split(",")}
    return (found | {socket.gethostname(), platform.node()}) - {""}
