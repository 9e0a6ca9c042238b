"""`invoke doctor`: what this machine can do, what is missing, and what to type for it. Changes nothing."""
