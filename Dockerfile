# The program, the libraries that it loads, and certificates: no shell and no package manager. The base is put together
# from Debian's packages instead of taken from a distroless image, so that Debian is the one source of all that is in it,
# and a rebuild brings its security updates. `make image-check` builds and runs it.
FROM rust:1.95-slim-bookworm AS build
# librdkafka is compiled from source, against Debian's OpenSSL and zlib.
RUN apt-get update \
    && apt-get install -y --no-install-recommends build-essential pkg-config libssl-dev zlib1g-dev \
    && rm -rf /var/lib/apt/lists/*
# They name the crates inside the program: in the program itself (`cargo audit bin`, Trivy, Grype), and as a CycloneDX SBOM.
RUN cargo install --locked cargo-auditable@0.7.7 && cargo install --locked cargo-cyclonedx@0.5.9
WORKDIR /build
ENV CARGO_PROFILE_RELEASE_STRIP=debuginfo
# The dependencies, in a layer of their own: it is built again only when the manifest changes.
COPY Cargo.toml Cargo.lock ./
COPY benches benches
RUN mkdir src && echo 'fn main() {}' >src/main.rs && touch src/lib.rs \
    && cargo auditable build --locked --release --bin payment-writer
COPY . .
# Shown by --version.
ARG PAYMENT_WRITER_COMMIT
# Cargo compares times, and those of the copied files are older than those of the placeholders.
RUN touch src/main.rs src/lib.rs \
    && cargo auditable build --locked --release --bin payment-writer \
    && cargo cyclonedx --format json --spec-version 1.5 --override-filename sbom.cdx

FROM debian:bookworm-slim AS base
WORKDIR /packages
# Unpacked without running their scripts. Scanners read /var/lib/dpkg/status.d, as they do in distroless images.
RUN apt-get update \
    && apt-get install -y --no-install-recommends ca-certificates \
    && apt-get download base-files ca-certificates libc6 libgcc-s1 libssl3 zlib1g \
    && mkdir -p /base/var/lib/dpkg/status.d \
    && for package in *.deb; do \
        dpkg-deb --extract "$package" /base \
        && dpkg-deb --field "$package" >"/base/var/lib/dpkg/status.d/${package%%_*}" || exit 1; \
    done \
    && rm -rf /base/etc/update-motd.d /base/usr/sbin /base/usr/share/doc/*/examples /base/usr/share/lintian /base/usr/share/man \
    # Made by the scripts of ca-certificates and openssl.
    && cp -a /etc/ssl/certs /base/etc/ssl/ \
    && mkdir -p /base/usr/lib/ssl && ln -s /etc/ssl/certs /base/usr/lib/ssl/certs \
    && echo 'hosts: files dns' >/base/etc/nsswitch.conf \
    && echo 'payment-writer:x:65532:65532::/nonexistent:/nonexistent' >/base/etc/passwd \
    && echo 'payment-writer:x:65532:' >/base/etc/group

FROM scratch
COPY --from=base /base /
COPY --from=build /build/sbom.cdx.json /usr/share/doc/payment-writer/sbom.cdx.json
# The shipped configuration is the default one; settings come from the environment.
COPY config/payment-writer.toml /etc/payment-writer/payment-writer.toml
COPY --from=build /build/target/release/payment-writer /usr/bin/payment-writer
# Probes and scrapes come from outside the container.
ENV PATH=/usr/bin \
    PAYMENT_WRITER_CONFIG=/etc/payment-writer/payment-writer.toml \
    PAYMENT_WRITER__ADMIN__LISTEN=0.0.0.0:9464
ARG PAYMENT_WRITER_COMMIT
LABEL org.opencontainers.image.title="payment-writer" \
    org.opencontainers.image.description="Writes payments from Kafka to Postgres exactly once, and publishes their events" \
    org.opencontainers.image.version="0.1.0" \
    org.opencontainers.image.revision="$PAYMENT_WRITER_COMMIT" \
    org.opencontainers.image.licenses="Apache-2.0"
USER 65532:65532
EXPOSE 9464
STOPSIGNAL SIGTERM
# Whether the process answers. Not whether it is ready: a daemon that waits for a database must not be killed.
HEALTHCHECK --interval=10s --timeout=5s --start-period=10s CMD ["payment-writer", "healthcheck"]
# As process 1 it gets SIGTERM itself and drains.
ENTRYPOINT ["payment-writer"]
CMD ["run"]
