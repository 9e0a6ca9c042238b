"""The SGLang lab: from a question about SGLang to an explained, repeatable, checked report.

Read the modules in this order; each imports only what stands above it:
errors → experiment (with claims and workload) → models, stack, site → plan → runtime, load →
execute → tables, stats, judge → report → tasks.py.
"""

__version__ = "0.1.0"
