"""From a run's raw files to something a person reads: tables, verdicts, plots, report.md. Never runs anything."""
