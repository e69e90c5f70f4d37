# Unbuilt where this was written (no Docker engine there); kept simple for that reason.
FROM rust:1.95-slim-bookworm AS build
# librdkafka is compiled from source, against Debian's OpenSSL and zlib.
RUN apt-get update \
    && apt-get install -y --no-install-recommends build-essential pkg-config libssl-dev zlib1g-dev \
    && rm -rf /var/lib/apt/lists/*
WORKDIR /build
COPY . .
RUN cargo build --locked --release --bin payment-writer

FROM debian:bookworm-slim
RUN apt-get update \
    && apt-get install -y --no-install-recommends ca-certificates libssl3 zlib1g \
    && rm -rf /var/lib/apt/lists/*
COPY --from=build /build/target/release/payment-writer /usr/local/bin/payment-writer
# The shipped configuration is the default one; settings come from the environment.
COPY config/payment-writer.toml /etc/payment-writer/payment-writer.toml
ENV PAYMENT_WRITER_CONFIG=/etc/payment-writer/payment-writer.toml
# Probes and scrapes come from outside the container.
ENV PAYMENT_WRITER__ADMIN__LISTEN=0.0.0.0:9464
USER 65532:65532
EXPOSE 9464
STOPSIGNAL SIGTERM
# As process 1 it gets SIGTERM itself and drains.
ENTRYPOINT ["payment-writer"]
CMD ["run"]
