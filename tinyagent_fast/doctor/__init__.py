"""What this machine has and lacks for a config: `doctor` shows it, `train` looks at it first."""
