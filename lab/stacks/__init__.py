"""A stack on disk: from its folder under containers/ to a built, checked environment, and its lock.

`build.ensure` is the way in; `lock` makes and reads requirements.txt, `python` finds the interpreter, `run` runs the
steps, `check` tells whether what is there is what was locked."""
