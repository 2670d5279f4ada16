# Two images of one source: `server` for the operator, without torch (API, worker and scheduler are
# three commands of it), `agent` for the sites.
#
#   docker build --target server -t fedselect-server .
#   docker build --target agent  -t fedselect-agent  .
#
# PYTHON_IMAGE may name a mirror or pin a digest. PIP_OPTIONS goes to every `pip install`: a mirror
# (--index-url ...), or the CPU-only build of torch (--extra-index-url ...). It is known to the build
# stages alone; nothing of it is left in an image, its history included.
ARG PYTHON_IMAGE=python:3.12-slim


FROM ${PYTHON_IMAGE} AS builder
ARG PIP_OPTIONS=""
ENV PIP_NO_CACHE_DIR=1 \
    PIP_NO_INPUT=1 \
    PIP_PROGRESS_BAR=off \
    PIP_DISABLE_PIP_VERSION_CHECK=1 \
    PIP_ROOT_USER_ACTION=ignore
WORKDIR /build
COPY pyproject.toml README.md constraints.txt ./


FROM builder AS wheel
ARG PIP_OPTIONS=""
COPY fedselect/ fedselect/
COPY app/ app/
COPY workers/ workers/
COPY migrations/ migrations/
RUN python -m pip wheel ${PIP_OPTIONS} --no-deps --wheel-dir /wheels .


# The libraries come first, as a layer that stays when only our source changes: /build holds no
# package yet, so '.[server]' is an empty wheel with all its requirements. Then the real wheel
# replaces it. The environment has no pip of its own, and is used at the path where it was made.
FROM builder AS server-environment
ARG PIP_OPTIONS=""
RUN python -m venv --without-pip /opt/fedselect
# Beyond the extra: celery's own one for Redis (kombu's transport imports packaging), and psutil,
# which the commands of the server half import with app.localstack.
RUN python -m pip --python /opt/fedselect/bin/python install ${PIP_OPTIONS} \
        --constraint constraints.txt '.[server]' 'celery[redis]' psutil
COPY --from=wheel /wheels/ /wheels/
RUN python -m pip --python /opt/fedselect/bin/python install \
        --no-index --no-deps --force-reinstall /wheels/*.whl \
    && python -m pip --python /opt/fedselect/bin/python check


FROM builder AS agent-environment
ARG PIP_OPTIONS=""
RUN python -m venv --without-pip /opt/fedselect
RUN python -m pip --python /opt/fedselect/bin/python install ${PIP_OPTIONS} \
        --constraint constraints.txt '.[torch]'
COPY --from=wheel /wheels/ /wheels/
RUN python -m pip --python /opt/fedselect/bin/python install \
        --no-index --no-deps --force-reinstall /wheels/*.whl \
    && python -m pip --python /opt/fedselect/bin/python check


# What both images share. Everything in them belongs to root and is read by uid 10001, so they run
# on a read-only file system with a tmpfs at /tmp, which is also home and numba's cache.
FROM ${PYTHON_IMAGE} AS runtime
RUN groupadd --gid 10001 fedselect \
    && useradd --uid 10001 --gid 10001 --no-create-home --home-dir /tmp \
        --shell /usr/sbin/nologin fedselect
ENV PATH=/opt/fedselect/bin:$PATH \
    HOME=/tmp \
    LANG=C.UTF-8 \
    NUMBA_CACHE_DIR=/tmp/numba \
    PYTHONDONTWRITEBYTECODE=1 \
    PYTHONUNBUFFERED=1
WORKDIR /opt/fedselect
ARG REVISION=unknown
LABEL org.opencontainers.image.vendor="FedSelect" \
      org.opencontainers.image.licenses="Apache-2.0" \
      org.opencontainers.image.revision="${REVISION}"


FROM runtime AS agent
LABEL org.opencontainers.image.title="fedselect-agent" \
      org.opencontainers.image.description="Runs beside a site's data and takes part in federated training"
# The key and the personal parameters of the site; the only thing of the container to keep.
RUN install --directory --mode 0700 --owner 10001 --group 10001 /state
COPY --from=agent-environment /opt/fedselect/ /opt/fedselect/
USER 10001:10001
VOLUME ["/state"]
ENTRYPOINT ["fedselect", "agent", "--state", "/state"]
CMD ["--help"]


# The last target is what a build without --target makes.
FROM runtime AS server
LABEL org.opencontainers.image.title="fedselect-server" \
      org.opencontainers.image.description="Coordinator, worker and scheduler of personalized federated learning"
# Where a worker puts files that are too large for its memory; mount a disk there (TMPDIR).
RUN install --directory --mode 0700 --owner 10001 --group 10001 /scratch
COPY --from=server-environment /opt/fedselect/ /opt/fedselect/
USER 10001:10001
EXPOSE 8000
CMD ["uvicorn", "--factory", "app.main:serve", "--host", "0.0.0.0", "--port", "8000", "--no-server-header", "--timeout-graceful-shutdown", "10"]
