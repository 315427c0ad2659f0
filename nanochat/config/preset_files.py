"""runs/*.py: the presets as config files. `python -m nanochat.config.preset_files` writes them."""

from pathlib import Path

from nanochat.config.config_file import literal
from nanochat.config.presets import REASONS

FOLDER = Path(__file__).resolve().parents[2] / "runs"


def render_preset(name: str) -> str:
    """The text of runs/<name>.py: a line for each setting that differs from its default, with the reason."""
    lines = [f"# Preset {name}: what differs from the defaults; `--help` of scripts.base_train lists all settings."]
    return (
        "\n".join(
            [*lines, *(f"{key} = {literal(value)}  # {reason}" for key, (value, reason) in REASONS[name].items())]
        )
        + "\n"
    )


def main() -> None:
    for name in REASONS:
        (FOLDER / f"{name}.py").write_text(render_preset(name), encoding="utf-8")


if __name__ == "__main__":
    main()
