"""Images of the stacks: from a stack's folder to an image in the machine's Docker engine.

`build.build_image` is the way in; `context` stages what is sent to the engine, `engine` finds a client that can build and asks
the engine, `wheels` fetches what only this machine's pip can see, `check` looks at the Dockerfile and at a built image."""
