# hypenet on TPU hosts: docker build -t hypenet . ; on GPU hosts: docker build --build-arg DEVICE=gpu -t hypenet-gpu .
FROM python:3.11-slim AS build
ARG DEVICE=tpu
WORKDIR /opt/hypenet
RUN python -m venv /opt/venv
COPY requirements.lock requirements-aot.lock ./
# The device's own packages: libtpu from the lock file, or what JAX of the locked version asks for on CUDA 13.
RUN case "$DEVICE" in \
      tpu) grep "^libtpu==" requirements-aot.lock > device.lock ;; \
      gpu) grep "^jax==" requirements.lock | sed "s/^jax==/jax[cuda13]==/" > device.lock ;; \
      *) echo "DEVICE is '$DEVICE'; use tpu or gpu" >&2; exit 2 ;; \
    esac \
    && /opt/venv/bin/pip install --no-cache-dir --no-deps -r requirements.lock \
    && /opt/venv/bin/pip install --no-cache-dir -c requirements.lock -r device.lock
COPY setup.py pyproject.toml README.md ./
COPY hypenet_jax hypenet_jax
COPY kernels_pallas kernels_pallas
RUN /opt/venv/bin/pip install --no-cache-dir --no-deps --no-build-isolation .

FROM python:3.11-slim
# launch/gke.yaml gives the bucket to this user.
RUN useradd --create-home --uid 1000 hypenet
COPY --from=build /opt/venv /opt/venv
COPY configs /home/hypenet/configs
USER hypenet
WORKDIR /home/hypenet
ENTRYPOINT ["/opt/venv/bin/hypenet"]
