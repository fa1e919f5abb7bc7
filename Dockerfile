# The commands in a container, for GPUs (the last stage) or for CPUs; README.md tells how it is built
# and run. The working directory, /work, is meant to be a folder of the user's.
FROM python:3.11-slim AS base

ENV PIP_NO_CACHE_DIR=1 \
    PIP_DISABLE_PIP_VERSION_CHECK=1 \
    PIP_ROOT_USER_ACTION=ignore \
    HOME=/work \
    LOGNAME=sag_dit
COPY pyproject.toml constraints.txt README.md LICENSE /opt/sag_dit/
COPY configs /opt/sag_dit/configs
COPY sag_dit /opt/sag_dit/sag_dit
# Weights that are downloaded are kept below HOME, so in your folder; any user may run the image.
WORKDIR /work
RUN chmod 1777 /work
ENTRYPOINT ["sag-dit"]

FROM base AS cpu
RUN pip install --constraint /opt/sag_dit/constraints.txt \
    --extra-index-url https://download.pytorch.org/whl/cpu "/opt/sag_dit[text,eval,lora]"
USER 1000:1000

FROM base AS gpu
# PyTorch's wheels bring CUDA; the driver is the machine's.
ENV NVIDIA_VISIBLE_DEVICES=all \
    NVIDIA_DRIVER_CAPABILITIES=compute,utility
RUN pip install --constraint /opt/sag_dit/constraints.txt "/opt/sag_dit[text,eval,lora]"
USER 1000:1000
