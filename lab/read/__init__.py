"""Readers of what other programs wrote: SGLang's log, metrics and record of requests, the clients' results.

Files in, rows out; whatever cannot be read is said, with its line, and never dropped."""
