# etcd as Debian packages it, for where no registry has one. Any image will do that has etcd in its path and a
# /var/lib/etcd that user 10001 may write: WEIR_ETCD_IMAGE names it.
FROM debian:bookworm-slim
RUN apt-get update \
 && apt-get install -y --no-install-recommends etcd-server \
 && rm -rf /var/lib/apt/lists/* /var/lib/etcd \
 && mkdir -m 700 /var/lib/etcd \
 && chown 10001:10001 /var/lib/etcd
USER 10001:10001
CMD ["etcd", "--help"]
