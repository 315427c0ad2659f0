"""runs/*.py: the presets as config files. `python -m nanochat.config.preset_files` writes them."""

from pathlib import Path

from nanochat.config.config_file import literal
from nanochat.config.declaration import fields_of
from nanochat.config.presets import REASONS
from nanochat.config.settings import Settings

FOLDER = Path(__file__).resolve().parents[2] / "runs"


def render_preset(name: str) -> str:
    """The text of runs/<name>.py: a line for each setting that differs from its default, with the reason."""
    lines = [f"# Preset {name}: what differs from the defaults; `--help` of scripts.base_train lists all settings."]
    for key in fields_of(Settings):
        if key in REASONS[name]:
            value, reason = REASONS[name][key]
            lines.append(f"{key} = {literal(value)}  # {reason}")
    return "\n".join(lines) + "\n"


def main() -> None:
    for name in REASONS:
        (FOLDER / f"{name}.py").write_text(render_preset(name), encoding="utf-8")


if __name__ == "__main__":
    main()
