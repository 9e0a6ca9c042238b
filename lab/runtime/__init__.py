"""Where the plan's commands run: in go argv, environment, CPU set and log file; out come processes that are
watched, ended in order, and never left behind. `process` runs them on this machine as they are."""
