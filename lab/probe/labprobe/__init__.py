"""Events from inside SGLang's scheduler processes, as JSON lines. Standard library only: it runs with the server's
interpreter, in the server's processes, and must never harm them. `load.load` is the way in."""
