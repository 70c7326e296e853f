"""How good a policy is: during a run (`policies`), and by `python -m rto_fast.evaluate` (`options`, `measure`)."""
