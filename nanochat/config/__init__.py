"""Settings: their declaration, presets, config.py and the command line."""
