# The image of a training job: docker build --build-arg EXTRA=tpu --tag IMAGE .
FROM python:3.11-slim
ARG EXTRA=tpu
WORKDIR /app
COPY constraints.txt pyproject.toml setup.cfg README.md LICENSE ./
COPY nrgpt_jax nrgpt_jax
RUN pip install --no-cache-dir --constraint constraints.txt --editable ".[${EXTRA},hf,gcs]"
COPY experiments experiments
