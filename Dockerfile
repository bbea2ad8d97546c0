# hypenet on TPU hosts: docker build -t hypenet . ; a GPU host has its own launcher, launch/gpu_local.sh.
FROM python:3.11-slim AS build
WORKDIR /opt/hypenet
RUN python -m venv /opt/venv
COPY requirements.lock requirements-aot.lock ./
RUN grep "^libtpu==" requirements-aot.lock > libtpu.lock \
    && /opt/venv/bin/pip install --no-cache-dir --no-deps -r requirements.lock -r libtpu.lock
COPY setup.py pyproject.toml README.md ./
COPY hypenet_jax hypenet_jax
COPY kernels_pallas kernels_pallas
RUN /opt/venv/bin/pip install --no-cache-dir --no-deps --no-build-isolation .

FROM python:3.11-slim
RUN useradd --create-home --uid 1000 hypenet
COPY --from=build /opt/venv /opt/venv
COPY configs /home/hypenet/configs
USER hypenet
WORKDIR /home/hypenet
ENTRYPOINT ["/opt/venv/bin/hypenet"]
