"""Environments and streams: encodings of a terminal, output that cannot be written, homes, launchers, folders."""

from pathlib import Path

from scripts.stress.inputs.cases import Case, Refused, Used
from scripts.stress.inputs.files import TRAIN
from scripts.stress.inputs.texts import text_of, write

RUN = ("scripts.base_train", "--data={in}/Größe 🙂.txt", "--sample_every=2", *TRAIN)
STEP = "base_checkpoints/try/step_000004/manifest.json"
LAUNCHER = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


def build(folder: Path) -> None:
    write("Größe 🙂.txt", text_of(20_000).encode(), folder)
    write("plain.txt", text_of(20_000).encode(), folder)


def case(label: str, expect=None, words=RUN, **options) -> Case:
    """A training of four steps in these surroundings; by default it must reach its last step."""
    return Case(label, build, [words], expect or Used(left=[STEP]), fresh=True, **options)


def cases() -> list[Case]:
    return [*_encodings(), *_streams(), *_homes(), *_launchers(), *_limits()]


def _encodings() -> list[Case]:
    found = [
        case(f"a terminal of {encoding}", environment={"PYTHONIOENCODING": encoding})
        for encoding in ("latin-1", "ascii", "cp1252", "utf-8:strict", "ascii:strict", "koi8-r")
    ]
    plain = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    umlaut = {"NANOCHAT_BASE_DIR": "{folder}/bäse ☃", "PYTHONIOENCODING": "latin-1"}
    inside = Used(left=["../bäse ☃/" + STEP])
    ascii_run = ("scripts.base_train", "--data={in}/plain.txt", "--sample_every=2", *TRAIN)
    found.append(case("the C locale", words=ascii_run, environment=plain))
    found.append(case("a name that the C locale cannot spell", Refused(["LC_ALL"]), environment=plain))
    found.append(case("an umlaut in the base folder on latin-1", inside, environment=umlaut))
    for words in (
        ("scripts.summary", "--model_tag=try"),
        ("scripts.inspect_checkpoint", "{base}/base_checkpoints/try"),
        ("scripts.base_generate", "--prompt=é ☃", "--max-tokens=8"),
        ("scripts.base_eval", "--eval=bpb,sample"),
        ("scripts.export_hf", "--out={folder}/öut ☃"),
    ):
        found.append(
            Case(f"{words[0]} on ascii", build, [RUN, words], Used(), {"PYTHONIOENCODING": "ascii:strict"}, fresh=True)
        )
    return found


def _streams() -> list[Case]:
    evaluate = ("scripts.base_eval", "--eval=bpb")
    report = Used(left=["base_eval/*.json"])
    return [
        case("standard output closed", stdout=None),
        case("standard error closed", stderr=None),
        case("both closed", stdout=None, stderr=None),
        case("standard output full", stdout="/dev/full"),
        case("standard error full", stderr="/dev/full"),
        case("both full", stdout="/dev/full", stderr="/dev/full"),
        Case("base_eval, standard output full", build, [RUN, evaluate], report, fresh=True, stdout="/dev/full"),
        Case("base_eval, standard output closed", build, [RUN, evaluate], report, fresh=True, stdout=None),
    ]


def _homes() -> list[Case]:
    none = {"HOME": None, "NANOCHAT_BASE_DIR": None}
    data = ("scripts.data", "--data={in}/Größe 🙂.txt")
    home = Used(left=["../home/.cache/nanochat/data/*/manifest.json"])

    def base(value: str) -> dict:
        return {"NANOCHAT_BASE_DIR": value}

    refused = Refused(["NANOCHAT_BASE_DIR"])
    return [
        case("--help without a home", Used(says=["usage"]), ("scripts.base_train", "--help"), environment=none),
        case(
            "--help for a home of nobody",
            Used(says=["usage"]),
            ("scripts.base_train", "--help"),
            environment=base("~nosuch/x"),
        ),
        case("a base folder at the home of nobody", refused, data, environment=base("~nosuch/x")),
        case("a base folder that is a file", refused, data, environment=base("{in}/Größe 🙂.txt")),
        case("a base folder below a file", refused, data, environment=base("{in}/Größe 🙂.txt/base")),
        case("a base folder below /proc", refused, data, environment=base("/proc/nosuch/base")),
        case("an empty NANOCHAT_BASE_DIR", home, data, environment=base("") | {"HOME": "{folder}/home"}),
        case("a relative base folder", Used(left=["../cwd/here/data/*/manifest.json"]), data, environment=base("here")),
        case("a name of 300 letters", refused, data, environment=base("{folder}/" + "x" * 300)),
        case("TMPDIR that is not there", environment={"TMPDIR": "{folder}/nosuch"}),
        case("no TERM, no columns", environment={"TERM": None, "COLUMNS": "0"}),
    ]


def _launchers() -> list[Case]:
    """Leftovers of a launcher are named, or count for nothing and are named too."""
    found = []
    for label, values, expect in (
        ("RANK and WORLD_SIZE of two", dict(RANK="0", WORLD_SIZE="2"), Refused(["RANK|WORLD_SIZE"])),
        ("WORLD_SIZE alone", dict(WORLD_SIZE="2"), Refused(["WORLD_SIZE"])),
        ("RANK beyond WORLD_SIZE", dict(RANK="3", WORLD_SIZE="2"), Refused(["RANK|WORLD_SIZE"])),
        ("RANK that is no number", dict(RANK="abc"), Refused(["RANK"])),
        ("WORLD_SIZE of nothing", dict(RANK="0", WORLD_SIZE="0"), Refused(["WORLD_SIZE"])),
        ("LOCAL_RANK alone", dict(LOCAL_RANK="1"), None),
        ("MASTER_ADDR alone", dict(MASTER_ADDR="10.0.0.1", MASTER_PORT="29500"), None),
    ):
        environment = dict.fromkeys(LAUNCHER) | values
        found.append(case(f"left by a launcher: {label}", expect, environment=environment))
    return found


def _limits() -> list[Case]:
    save = (*RUN, "--save_every=2")
    return [
        case("a file-size limit of 300 KB in a save", Refused(["step_000002|File too large"]), save, limit=300_000),
        case("a file-size limit of 4 KB in the data", Refused(["data|shard|File too large"]), limit=4_000),
    ]
