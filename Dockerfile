# Image for CPUs and, with the arguments below, GPUs. Build: docker build -t heddle .   Run: docker run -p 127.0.0.1:8000:8000 heddle
# There is no authentication: put a proxy in front before you publish the port to others.
# The host's kernels, compiled here since the image has no compiler
FROM python:3.11 AS compiled
COPY kernels /kernels
RUN python /kernels/host/build.py

FROM python:3.11-slim

RUN useradd --create-home heddle
WORKDIR /heddle
COPY pyproject.toml constraints.txt README.md LICENSE ./
COPY adapters_store adapters_store
COPY kernels kernels
COPY --from=compiled /kernels/host/prebuilt kernels/host/prebuilt
COPY server server
COPY demo demo
# The default build of torch brings CUDA with it. For a tenth of the size, name the index of torch's CPU builds. torch alone
# comes from there: with two indexes at once either could answer for a name that is the other's.
#   docker build --build-arg TORCH_INDEX=URL …
ARG TORCH_INDEX=""
# For a GPU (docker run --gpus all): --build-arg EXTRAS="[cuda]" --build-arg APT="gcc libc6-dev", since Triton needs a compiler
ARG EXTRAS=""
ARG APT=""
RUN if [ -n "${APT}" ]; then apt-get update && apt-get install -y --no-install-recommends ${APT} \
  && rm -rf /var/lib/apt/lists/*; fi
RUN if [ -n "${TORCH_INDEX}" ]; then pip install --no-cache-dir --index-url "${TORCH_INDEX}" -c constraints.txt torch; fi
RUN pip install --no-cache-dir -c constraints.txt -e ".${EXTRAS}"
# registered adapters: mount a volume here, else they are forgotten with the container
RUN mkdir /var/lib/heddle && chown heddle /var/lib/heddle
VOLUME /var/lib/heddle

USER heddle
ENV HF_HUB_OFFLINE=1 XDG_DATA_HOME=/var/lib
EXPOSE 8000
HEALTHCHECK --start-period=60s --interval=10s --timeout=3s \
  CMD python -c "import urllib.request; urllib.request.urlopen('http://127.0.0.1:8000/health')"
ENTRYPOINT ["heddle", "serve", "--host", "0.0.0.0"]
