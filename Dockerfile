# The command fedamm in an image: docs/running.md says how to build and run it.
ARG PYTHON=3.11
FROM python:${PYTHON}-slim

WORKDIR /source
COPY requirements.txt .
RUN pip install --no-cache-dir -r requirements.txt

COPY pyproject.toml setup.py MANIFEST.in README.md LICENSE ./
COPY configs configs
COPY fedamm_pl fedamm_pl
RUN pip install --no-cache-dir --no-deps .

# Any user may run it (docker run --user), also one without a home.
ENV MPLCONFIGDIR=/tmp/matplotlib
RUN useradd fedamm
USER fedamm
# The folder to mount: data/ and runs/ lie in it.
WORKDIR /work
ENTRYPOINT ["fedamm"]
CMD ["--help"]
