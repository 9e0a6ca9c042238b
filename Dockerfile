# The lab's images: base -> torch -> packages -> cpu | cu125 | cu130.
#
# `invoke image.build` builds them. The build context is not this folder: the lab stages one per stack (Dockerfile, the lock
# in parts, shims, uv, wheels, stack.json; `invoke image.context` leaves it where you say), with args.txt, which holds the
# build arguments, and labels.txt. docs/decisions/0007-images.md says why it is made this way.
#
# No mirror is named here: packages come from where uv looks by itself, or from INDEX_URL where a site names its own.

# e.g. an image with its digest, as stack.toml says
ARG BASE

# Python and an empty environment in /opt/stack, the user of the image, and packages of the distribution (profilers).
FROM ${BASE} AS base
# of Python; used where the base has no finished release of that minor version
ARG PYTHON
# exact versions, e.g. NAME=VERSION
ARG PACKAGES=""
# all that the build writes is dated so (seconds since 1970)
ARG SOURCE_DATE_EPOCH
ENV LANG=C.UTF-8 \
    PATH=/opt/stack/bin:$PATH \
    HOME=/home/lab \
    USER=lab
RUN --mount=type=tmpfs,target=/tmp \
    --mount=type=bind,source=image/steps.sh,target=/tmp/lab/steps.sh \
    --mount=type=bind,source=uv,target=/tmp/lab/uv \
    /tmp/lab/steps.sh base

# The large wheels, in a layer of their own: a new SGLang does not send them through the network again.
FROM base AS torch
ARG INDEX_URL=""
# where uv is to look for torch when the wheels of the context do not have it, as in `uv pip install --torch-backend`
ARG TORCH_BACKEND=""
RUN --mount=type=tmpfs,target=/tmp \
    --mount=type=bind,source=image/steps.sh,target=/tmp/lab/steps.sh \
    --mount=type=bind,source=uv,target=/tmp/lab/uv \
    --mount=type=bind,source=torch.txt,target=/tmp/lab/torch.txt \
    --mount=type=bind,source=wheels,target=/tmp/lab/wheels \
    --mount=type=cache,target=/tmp/lab/cache \
    /tmp/lab/steps.sh wheels /tmp/lab/torch.txt

# Everything else that is locked. What is published as source only (source.txt) is built by the setuptools just installed,
# not by one that the index happens to have today. Last, the shims.
FROM torch AS packages
RUN --mount=type=tmpfs,target=/tmp \
    --mount=type=bind,source=image/steps.sh,target=/tmp/lab/steps.sh \
    --mount=type=bind,source=uv,target=/tmp/lab/uv \
    --mount=type=bind,source=packages.txt,target=/tmp/lab/packages.txt \
    --mount=type=bind,source=source.txt,target=/tmp/lab/source.txt \
    --mount=type=bind,source=shims,target=/tmp/lab/shims \
    --mount=type=bind,source=wheels,target=/tmp/lab/wheels \
    --mount=type=cache,target=/tmp/lab/cache \
    /tmp/lab/steps.sh wheels /tmp/lab/packages.txt \
    && /tmp/lab/steps.sh source /tmp/lab/source.txt \
    && /tmp/lab/steps.sh shims /tmp/lab/shims

# The smoke step measures what is there, compares it with stack.toml, and writes /opt/stack/lab-image.json.
RUN --mount=type=tmpfs,target=/tmp \
    --mount=type=bind,source=image/steps.sh,target=/tmp/lab/steps.sh \
    --mount=type=bind,source=image/smoke.py,target=/tmp/lab/smoke.py \
    --mount=type=bind,source=stack.json,target=/tmp/lab/stack.json \
    /tmp/lab/steps.sh smoke /tmp/lab/stack.json
USER 10001:10001
WORKDIR /home/lab
ENTRYPOINT []
CMD ["python"]

FROM packages AS cpu

# A container gets the GPUs it is given: without a request it sees none, whatever the base image asks for.
FROM packages AS cuda
ENV NVIDIA_VISIBLE_DEVICES=void \
    NVIDIA_DRIVER_CAPABILITIES=compute,utility \
    CUDA_DEVICE_ORDER=PCI_BUS_ID

FROM cuda AS cu125

FROM cuda AS cu130
