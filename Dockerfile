# One image with every binary of Weir; the command says what a container is. Works with and without BuildKit.
#
#   docker build -t weir .
#   docker build -t weir --build-arg PROFILE=release .       # builds faster, runs slower
#   docker build -t weir --build-arg WEIR_COMMIT="$(git rev-parse --short HEAD)" .   # named by --version

# The manifests, and an empty program wherever cargo looks for a file. This stage runs at every change; what the next
# one copies from it changes only with the dependencies, so those stay built.
FROM rust:1-slim-bookworm AS skeleton
WORKDIR /src
COPY . .
RUN mkdir /skeleton \
 && find . \( -name Cargo.toml -o -name Cargo.lock \) -exec cp --parents {} /skeleton \; \
 && find . \( -name main.rs -o -name lib.rs -o -name build.rs -o -path '*/bin/*.rs' -o -path '*/benches/*.rs' \) \
      -exec sh -c 'mkdir -p "/skeleton/${1%/*}" && echo "fn main() { }" > "/skeleton/$1"' - {} \;

FROM rust:1-slim-bookworm AS build
WORKDIR /src
# A profile of Cargo.toml: dist or release. Neither has debug information; names of functions stay, for backtraces.
ARG PROFILE=dist
ENV CARGO_INCREMENTAL=0 \
    CARGO_NET_RETRY=5 \
    PACKAGES="-p weir -p weir-gateway -p weir-control-plane -p weir-ratelimit-service -p mock-llm"
COPY --from=skeleton /skeleton .
RUN cargo build --profile $PROFILE --locked --bins $PACKAGES
COPY . .
ARG WEIR_COMMIT=unknown
# Cargo goes by times, and files come with those of the checkout: older than the empty programs built above.
RUN find . -name '*.rs' -exec touch {} + \
 && WEIR_COMMIT="$WEIR_COMMIT" cargo build --profile $PROFILE --locked --bins $PACKAGES \
 && mkdir /out && find target/$PROFILE -maxdepth 1 -type f -executable -exec cp -t /out {} +

FROM debian:bookworm-slim
# For backends behind https. Copied, so that this stage needs no network.
COPY --from=build /etc/ssl/certs/ca-certificates.crt /etc/ssl/certs/ca-certificates.crt
# A fresh volume takes the owner of the directory it is mounted on. Between the two copies on purpose: the classic builder
# loses a layer of one COPY --from that follows another (moby/moby#37965).
RUN mkdir -p /var/lib/weir /etc/weir/admin-token /etc/weir/ops-token /etc/weir/limit-token /etc/weir/credentials \
      /etc/weir/gateway-token /etc/weir/gateway-tokens \
      /etc/weir/own/ratelimit $(seq -f /etc/weir/own/gateway-%.0f 16) \
 && chown -R 10001:10001 /var/lib/weir /etc/weir
COPY --from=build /out/ /usr/local/bin/
USER 10001:10001
WORKDIR /var/lib/weir
CMD ["weir", "--help"]
