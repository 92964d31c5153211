// The board: puts the frames of the stream into tables, tiles and lists.

const board = {
  lines: null,
  state: null,
  log: null,
  operates: false,
  wanted: "",
  allLimits: false,
  sparks: {
    requests: new Spark("Requests per second"), failed: new Spark("Failures per second", "bad"),
    refused: new Spark("Refusals per second", "warn"), in_flight: new Spark("Requests in flight"),
    p50: new Spark("Median time to the first byte", "info"),
  },
  backends: new Rows($("backends").tBodies[0], backendRow),
  limits: new Rows($("limits").tBodies[0], limitRow),
  gateways: new Rows($("gateways").tBodies[0], gatewayRow),
  events: new Rows($("events"), eventRow),
  changes: new Rows($("changes"), changeRow),

  tile(name, figure, under, alert = false) {
    const tile = $(`tile-${name}`);
    put(tile.querySelector("b"), figure);
    if (under !== null) put(tile.querySelector(".under"), under);
    tile.classList.toggle("alert", alert);
  },

  showState() {
    const { state } = this;
    if (!state || document.hidden) return;
    const { totals, backends, gateways } = state;
    const now = state.time;
    this.tile("requests", rate(totals.requests), `${compact.format(totals.tokens)} tokens/s written`);
    this.tile("failed", rate(totals.failed), null, totals.failed > 0);
    this.tile("refused", rate(totals.refused), null);
    const slots = backends.reduce((sum, backend) => sum + (backend.admin === "active" ? backend.max : 0), 0);
    this.tile("in_flight", whole.format(totals.in_flight), `of ${whole.format(slots)} slots`);
    this.tile("p50", latency(totals.p50), totals.p99 === null ? "" : `p99 ${latency(totals.p99)}`);
    const pools = new Map();
    for (const backend of backends) pools.set(backend.pool, (pools.get(backend.pool) || 0) + backend.effective);
    this.backends.update(backends, (backend) => backend.name, { pools, now, operates: this.operates, wanted: this.wanted });
    $("filter-label").hidden = backends.length < 9;
    const many = state.limits.length - LIMITS_FIRST;
    const limits = this.allLimits ? state.limits : state.limits.slice(0, LIMITS_FIRST);
    $("all-limits").hidden = many <= 0;
    put($("all-limits"), this.allLimits ? `Show the first ${LIMITS_FIRST} only` : `Show ${many} more`);
    this.limits.update(limits, (limit) => `${limit.scope_kind}/${limit.scope}/${limit.kind}`, {});
    this.gateways.update(gateways, (gateway) => `${gateway.role}/${gateway.id}`, { now });
    const well = backends.filter((backend) => backend.admin === "active" && backend.state === "healthy").length;
    const active = backends.filter((backend) => backend.admin === "active").length;
    const unwell = active - well;
    put($("backends-note"), `${well} of ${active} active ones healthy`);
    const here = gateways.filter((gateway) => gateway.role === "gateway" && gateway.sync !== "disconnected");
    const synced = here.filter((gateway) => gateway.sync === "in sync").length;
    put($("gateways-note"), `${synced} of ${here.length} in sync at revision ${state.revision}`);
    put($("summary"), `revision ${state.revision} · ${synced} of ${here.length} gateways in sync · ${well} of ${active} backends healthy`);
    put($("build"), `Weir ${state.build} · store ${state.epoch}`);
    const title = unwell > 0 ? `${unwell} not healthy · Weir` : "Weir";
    if (document.title !== title) document.title = title;
  },

  showLines() {
    const { lines } = this;
    if (!lines || document.hidden) return;
    for (const [name, spark] of Object.entries(this.sparks)) {
      spark.draw(lines[name], lines.points, name === "p50" ? latency : rate, name === "p50" ? 1 : 0.5);
    }
    for (const [name, row] of this.backends.rows) row.draw(lines.backends[name], lines.points);
  },

  showLog() {
    if (!this.log || document.hidden) return;
    const first = this.events.rows.size === 0;
    const known = new Set([...this.events.rows.keys(), ...this.changes.rows.keys()]);
    this.events.update(this.log.events, (event) => `e${event.number}`, {});
    this.changes.update(this.log.changes, (entry) => `c${entry.sequence}`, {});
    if (known.size > 0) {
      for (const rows of [this.events.rows, this.changes.rows]) {
        for (const [id, row] of rows) if (!known.has(id)) row.elements[0].classList.add("fresh");
      }
    }
    // Only new events are read out by screen readers.
    if (first) setTimeout(() => $("events").setAttribute("aria-live", "polite"), 1_000);
  },

  take(event, value) {
    switch (event) {
      case "hello":
        this.operates = value.operates;
        put($("who"), `${value.name === value.role ? value.name : `${value.name}, ${value.role}`}${value.operates ? "" : ": reads only"}`);
        $("who").hidden = false;
        break;
      case "state":
        this.state = value;
        this.showState();
        if (this.backends.rows.size !== this.drawn) {
          this.drawn = this.backends.rows.size;
          this.showLines();
        }
        break;
      case "lines":
        this.lines = value;
        this.showLines();
        break;
      case "point":
        if (this.lines) {
          const push = (line, point) => {
            line.push(point ?? null);
            if (line.length > this.lines.points) line.shift();
          };
          for (const name of Object.keys(this.sparks)) push(this.lines[name], value[name]);
          for (const [name, point] of Object.entries(value.backends)) {
            const own = (this.lines.backends[name] ??= { load: [], p50: [] });
            push(own.load, point.load);
            push(own.p50, point.p50);
          }
          for (const name of Object.keys(this.lines.backends)) {
            if (!Object.hasOwn(value.backends, name)) delete this.lines.backends[name];
          }
          this.showLines();
        }
        break;
      case "log":
        this.log = value;
        this.showLog();
        break;
      case "refused":
        feed.refuse(value.error);
        break;
    }
  },
};

for (const [name, spark] of Object.entries(board.sparks)) $(`tile-${name}`).append(spark.svg);
