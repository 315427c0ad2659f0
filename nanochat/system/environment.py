"""What a process finds in its environment: the base folder, the compilers' caches, the variables of a launcher."""

import hashlib
import os
import re
import shlex
import stat
import sys
import tempfile
from contextlib import suppress
from pathlib import Path

# In a path: what ends a word of a command line, or of a string in generated code, and bytes that are no UTF-8.
AWKWARD = re.compile(r"[\s'\"\\\ud800-\udfff]")


class UserError(ValueError):
    """What the user did: scripts print it as one line (name, value, way out) and exit with code 2.

    Before the ranks have met, all of them make the same mistake and rank 0 prints it. own: this one made it alone.
    """

    own = False


class SharedError(UserError):
    """A UserError that every rank raises at the same point: rank 0 prints it."""


def rank_error(message: str) -> UserError:
    """A UserError that its rank prints itself."""
    error = UserError(message)
    error.own = True
    return error


def base_dir() -> Path:
    """The folder that holds everything a run makes: NANOCHAT_BASE_DIR, by default ~/.cache/nanochat; absolute.

    UserError for a value that cannot be a folder. Whether one can write there is found out by writing.
    """
    given = os.environ.get("NANOCHAT_BASE_DIR")
    if not given:
        try:
            return Path.home() / ".cache" / "nanochat"
        except RuntimeError as error:
            raise UserError("this user has no home folder: set NANOCHAT_BASE_DIR to a folder for all files") from error
    try:
        path = expand_user(given, "NANOCHAT_BASE_DIR").absolute()
    except FileNotFoundError as error:
        raise UserError(f"NANOCHAT_BASE_DIR={given!r}: the current folder is gone, give the whole path") from error
    try:
        os.fsencode(path).decode("utf-8")
    except UnicodeDecodeError as error:  # whatever the locale makes of the bytes
        raise UserError(
            f"NANOCHAT_BASE_DIR={given!a} is no UTF-8, which the library that reads weights demands: rename the folder"
        ) from error
    try:
        if not stat.S_ISDIR(path.stat().st_mode):
            raise UserError(f"NANOCHAT_BASE_DIR={given!r} is a file: name a folder")
    except FileNotFoundError:
        if given != given.strip():
            raise UserError(f"NANOCHAT_BASE_DIR={given!r} has white space at its ends: leave it out") from None
    except OSError as error:
        raise UserError(f"NANOCHAT_BASE_DIR={given!r} cannot be used ({error.strerror}): name a folder") from error
    return path


def expand_user(path: str | Path, name: str) -> Path:
    """The path, a leading ~ replaced; UserError, which calls the value `name`, for a user without a home."""
    try:
        return Path(path).expanduser()
    except RuntimeError as error:
        raise UserError(f"{name}={str(path)!r}: there is no such home folder, give the whole path") from error


def keep_caches() -> None:
    """Let compilers keep what they make below base_dir() instead of the temporary and the home folder.

    To be called before torch._dynamo is imported, which fixes the place. Without a base folder nothing is set: --help
    needs none, and whatever else is asked for says what is wrong with it.
    """
    try:
        folder = base_dir() / "compiled"
    except UserError:
        return
    for name in ("TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR", "CUDA_CACHE_PATH", "PYTORCH_KERNEL_CACHE_PATH"):
        os.environ.setdefault(name, str(folder / name.split("_")[0].lower()))


def import_compiler() -> None:
    """Import torch's compiler so that its files, headers included, lie in the caches, under paths that it can use.

    It asks for the temporary folder, in which it puts its headers, only when it is imported.
    """
    if cache := os.environ.get("TORCHINDUCTOR_CACHE_DIR"):
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = cache = str(plain_path(Path(cache)))
    if (temporary := os.environ.get("TMPDIR")) and os.path.isdir(temporary):
        os.environ["TMPDIR"] = str(plain_path(Path(temporary)))  # headers are preprocessed there
        if tempfile.tempdir == temporary:
            tempfile.tempdir = None
    before, tempfile.tempdir = tempfile.tempdir, cache
    try:
        import torch._inductor.codecache  # noqa: F401
        from torch._inductor import cpp_builder
    finally:
        tempfile.tempdir = before
    _quote_library_folders(cpp_builder)


def plain_path(folder: Path) -> Path:
    """The folder, under a name that torch can write into a command line and into generated code.

    torch 2.13 does not quote all the paths that it hands to g++, so one with white space, a quote or a backslash is
    reached through a symbolic link: <temporary folder>/nanochat-<user id>/<hash of the path>. Where no such link can be
    made, the folder as it is.
    """
    if not AWKWARD.search(str(folder)):
        return folder
    with suppress(OSError):
        folder.mkdir(parents=True, exist_ok=True)  # a link to nothing could not be made a folder
    for place in filter(None, (os.environ.get("TMPDIR"), "/tmp", "/var/tmp")):
        private = Path(place).absolute() / f"nanochat-{os.getuid()}"
        link = private / hashlib.sha256(os.fsencode(folder)).hexdigest()[:16]
        if AWKWARD.search(str(link)):
            continue
        with suppress(OSError):  # not writable, or full: the next place
            private.mkdir(mode=0o700, exist_ok=True)
            owner = private.lstat()
            if not stat.S_ISDIR(owner.st_mode) or owner.st_uid != os.getuid() or owner.st_mode & 0o022:
                continue  # somebody else could lead us to code of theirs
            if not link.is_symlink() or os.readlink(link) != str(folder):
                new = private / f".{link.name}-{os.getpid()}"
                new.symlink_to(folder)
                os.replace(new, link)  # ranks do this at the same moment
            return link
    return folder


def _quote_library_folders(cpp_builder) -> None:
    """Have torch quote the folders of its libraries, as it does those of its headers: an environment may lie below a
    folder with a blank in its name. torch 2.14 does so itself, and nothing is quoted twice.
    """
    kind = cpp_builder.BuildOptionsBase
    probe = kind(compiler="g++", libraries_dirs=["/a blank"])
    line = cpp_builder.CppBuilder("probe", "probe.cpp", probe).get_command_line()
    if "-L/a blank" in shlex.split(line):
        return
    as_torch_has_it = kind.get_libraries_dirs

    def quoted(self) -> list[str]:
        return [shlex.quote(folder) for folder in as_torch_has_it(self)]

    kind.get_libraries_dirs = quoted


# ---------------------------------------------------------------------------------------------------------------------
# the launcher of several ranks


LAUNCHER = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")  # what a launcher sets for each of its processes
LOCAL = ("LOCAL_RANK", "LOCAL_WORLD_SIZE", "TORCHELASTIC_RUN_ID", "TORCHELASTIC_RESTART_COUNT")  # and may set besides


def check_launcher() -> None:
    """UserError for launcher variables that describe no rank; leftovers that can be ignored are, and that is said.

    RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT together are a launch, by torchrun or by hand. Without RANK and
    WORLD_SIZE this is a process of its own.
    """
    values = {name: os.environ[name] for name in (*LAUNCHER, *LOCAL) if os.environ.get(name)}
    for name in (*LAUNCHER, *LOCAL):
        if name not in values:
            os.environ.pop(name, None)  # empty is as good as absent
    if not {"RANK", "WORLD_SIZE"} & values.keys():
        if leftovers := sorted(values.keys() - {"MASTER_ADDR", "MASTER_PORT"}):
            ignored = " ".join(f"{name}={values[name]}" for name in leftovers)
            print(f"ignoring {ignored}: no launcher set RANK and WORLD_SIZE", file=sys.stderr, flush=True)
            for name in leftovers:
                del os.environ[name]
        return
    if (problem := _find_launcher_fault(values)) is None:
        return
    given = " ".join(f"{name}={value}" for name, value in values.items())
    raise rank_error(
        f"{given}: {problem}; for a single process `unset {' '.join(values)}`, for several start them with torchrun"
    )


def _find_launcher_fault(values: dict[str, str]) -> str | None:
    """What is wrong with the launcher variables that are set, RANK or WORLD_SIZE among them; None when nothing is."""
    numbers = {}
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_PORT", "TORCHELASTIC_RESTART_COUNT"):
        if name in values:
            if not values[name].isascii() or not values[name].isdigit():
                return f"{name} is not a whole number"
            numbers[name] = int(values[name])
    if numbers.get("RANK", 0) == 0 and numbers.get("WORLD_SIZE", 1) == 1 and not numbers.get("LOCAL_RANK"):
        return None  # a single process, however complete the rest is
    if numbers.get("MASTER_PORT", 0) > 65535:
        return "MASTER_PORT is no port"
    if missing := [name for name in LAUNCHER if name not in values]:
        return f"{' and '.join(missing)} {'are' if len(missing) > 1 else 'is'} missing"
    if numbers["RANK"] >= numbers["WORLD_SIZE"]:
        return "RANK must be below WORLD_SIZE"
    if numbers.get("LOCAL_RANK", 0) >= numbers.get("LOCAL_WORLD_SIZE", numbers["WORLD_SIZE"]):
        return "LOCAL_RANK must be below the number of processes here"
    return None


def rank_from_env() -> int:
    """This process's rank as its launcher has set it; 0 without one."""
    return int(os.environ.get("RANK", 0))


def world_size_from_env() -> int:
    """The number of processes that a launcher started; 1 without one."""
    return int(os.environ.get("WORLD_SIZE", 1))


def under_torchrun() -> bool:
    """Whether torchrun started this process."""
    return "TORCHELASTIC_RUN_ID" in os.environ


def restarts_from_env() -> int:
    """How often torchrun has started the ranks anew after a failure."""
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0))
