# bf16prof with everything that measuring on CPUs needs. For a GPU, start from an image that brings its own torch:
#   docker build --build-arg BASE=nvcr.io/nvidia/pytorch:25.09-py3 --build-arg EXTRAS= -t bf16prof .
#   docker run --rm --gpus all -v "$PWD:/work" bf16prof doctor
ARG BASE=python:3.11-slim
FROM ${BASE}

# DeepSpeed's CPU optimizers and our counting allocator are compiled at their first use.
RUN apt-get update -qq \
    && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends g++ \
    && rm -rf /var/lib/apt/lists/*

ARG EXTRAS=[train,hf,recipes]
COPY . /src
RUN pip install --no-cache-dir --constraint /src/constraints.txt "/src${EXTRAS}" && rm -rf /src

WORKDIR /work
ENTRYPOINT ["bf16prof"]
CMD ["--help"]
