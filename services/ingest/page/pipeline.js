/** The pipeline's state: what is wrong and what to do, rates, nodes, partitions. The service has a new snapshot each second. */

import { json, url } from "./api.js";
import { asCommands, button, bytes, commands, count, fill, h, linkButton, moment, problemBox, rate, seconds, since, svg } from "./dom.js";
import { t } from "./texts.js";

const REFRESH_SECONDS = 0.5;
/** what the charts show, seconds */
const WINDOW_SECONDS = 300;
const [WIDTH, HEIGHT] = [320, 64];

class Pipeline extends HTMLElement {
	connectedCallback() {
		this.gone = new AbortController();
		this.points = [];
		this.message = h("div.messages");
		this.age = h("p.muted.small.summary");
		this.conditions = h("section", { "aria-label": t("conditions"), "aria-live": "polite" });
		this.charts = h("div.tiles");
		this.nodes = h("div.tiles.nodes");
		this.partitions = h("div");
		this.integrity = h("div");
		this.versions = h("p.muted.small");
		const section = (title, ...content) => h("section", {}, h("h2", {}, title), ...content);
		fill(this, h("div.page", {},
			h("div.bar.wrap", {}, h("h1", { tabindex: "-1" }, t("view-pipeline")), this.age,
				h("div.actions", {}, button(t("commands"), () => commands({ ...asCommands(url("pipeline").href), fiq: "fiq status\nfiq doctor" }), { glyph: "code" }),
					linkButton())),
			this.message, this.conditions, section(t("flow"), this.charts), section(t("nodes"), this.nodes),
			section(t("partitions"), this.partitions), section(t("integrity"), this.integrity), this.versions));
		this.refresh();
	}

	disconnectedCallback() {
		this.gone.abort();
		clearTimeout(this.timer);
	}

	async refresh() {
		try {
			const state = await json("pipeline", { signal: AbortSignal.any([this.gone.signal, AbortSignal.timeout(10_000)]) });
			fill(this.message);
			this.draw(state);
		} catch (problem) {
			if (this.gone.signal.aborted) return;
			fill(this.message, problemBox(problem));
			this.classList.add("stale");
			if (problem.status === 401 || problem.status === 403) return;
		}
		this.timer = setTimeout(() => this.refresh(), REFRESH_SECONDS * 1000);
	}

	draw(state) {
		this.classList.remove("stale");
		fill(this.age, t("seen", { age: state.seen_seconds === null ? "?" : seconds(state.seen_seconds) }));
		this.drawConditions(state.conditions);
		this.keep(state);
		this.drawCharts(state);
		this.drawNodes(state);
		this.drawPartitions(state);
		this.drawIntegrity(state.volumes);
		const { fiq, nats_server: nats, persisters } = state.versions;
		this.versions.textContent = [`fiq ${fiq}`, nats && `nats-server ${nats}`, persisters?.length && t("persisterVersions", { list: persisters.join(", ") })].filter(Boolean).join(" · ");
	}

	drawConditions(conditions) {
		const version = JSON.stringify(conditions);
		if (version === this.conditionsVersion) return;
		this.conditionsVersion = version;
		const kind = { error: "bad", warning: "warn", unknown: "warn" };
		fill(this.conditions, conditions.length
			? conditions.map((one) => h("div.notice", { class: kind[one.severity] ?? "warn" },
					h("p", {}, h("span.tag", { class: kind[one.severity] ?? "warn" }, t(`severity-${one.severity}`)), " ", h("b", {}, one.what), " ", h("code", {}, one.check)),
					one.meaning && h("p.muted", {}, one.meaning), one.action && h("p.action", {}, h("b", {}, `${t("whatToDo")}: `), one.action)))
			: h("div.notice.good", {}, h("p", {}, t("allWell"))));
	}

	// -- rates ----------------------------------------------------------------------------------------------------------

	/** Keep a point of the charts; another process has another clock, and begins anew. */
	keep(state) {
		const { accepted, persisted, monotonic_seconds: at } = state.totals;
		const last = this.points.at(-1);
		if (at === null || (last && at === last.at)) return;
		if (last && (at < last.at || at - last.at > 60)) this.points = [];
		this.points.push({ at, accepted, persisted, backlog: state.backlog.events });
		while (at - this.points[0].at > WINDOW_SECONDS) this.points.shift();
	}

	rates(name) {
		return this.points.slice(1).map((point, index) => {
			const before = this.points[index];
			const change = point[name] === null || before[name] === null ? 0 : point[name] - before[name];
			return { at: point.at, value: Math.max(0, change / (point.at - before.at)) };
		});
	}

	drawCharts(state) {
		const perSecond = (name) => {
			const found = this.rates(name);
			return tile(t(name), found.length ? t("perSecond", { n: rate(found.at(-1).value) }) : "–", state.totals[name] === null ? "" : t("total", { n: count(state.totals[name]) }), chart(found, t(name)));
		};
		const backlog = this.points.filter((point) => point.backlog !== null).map((point) => ({ at: point.at, value: point.backlog }));
		const { events, limit } = state.backlog;
		const full = limit ? (events ?? 0) / limit : 0;
		const dead = state.dead_letters;
		fill(this.charts,
			perSecond("accepted"), perSecond("persisted"),
			tile(t("backlog"), events === null ? "–" : count(events), limit ? t("ofLimit", { n: count(limit), percent: Math.round(full * 100) }) : "", chart(backlog, t("backlog"), full >= 0.5 ? "bad" : "")),
			h("div.tile.card", {}, h("h3", {}, t("setAside")),
				h("p", {}, h("a", { href: "#/dead-letters" }, dead === null ? "–" : t("deadCount", { n: count(dead) }))),
				h("p", {}, state.conflicts === null ? "–" : t("conflictCount", { n: count(state.conflicts) })),
				state.stream && h("p.muted.small", {}, t("streamUse", { n: count(state.stream.messages), size: bytes(state.stream.bytes), max: bytes(state.stream.max_bytes) }))));
	}

	// -- nodes and partitions -------------------------------------------------------------------------------------------

	drawNodes(state) {
		if (!state.nodes.length) return fill(this.nodes, h("p.muted", {}, t("noNodes")));
		return fill(this.nodes, state.nodes.map((node) =>
			h("div.tile.card.node", { class: node.up ? "" : "down" },
				h("h3", {}, h("span.dot", { class: node.up ? (node.current ? "good" : "warn") : "bad", "aria-hidden": "true" }), node.name),
				h("p", {}, node.up ? t("up") : t("down"), node.leader && h("span.tag", {}, t("leader"))),
				h("p.muted.small", {}, node.current ? t("current") : t("behind", { n: count(node.lag) })))),
			state.stream && !state.stream.quorum && h("div.notice.bad", {}, t("noQuorum")));
	}

	drawPartitions(state) {
		const largest = Math.max(1, ...state.partitions.map((one) => one.lag));
		const several = new Set(state.partitions.map((one) => one.store)).size > 1;
		const volumes = [...new Set(state.partitions.map((one) => one.volume))];
		const head = [several && t("store"), t("partition"), t("lag"), t("age"), t("owner"), t("volume"), t("committed")].filter(Boolean);
		const numbers = new Set([t("lag"), t("age"), t("committed")]);
		const rows = state.partitions.map((one) => {
			const meter = h("meter", { min: 0, max: largest, value: one.lag, "aria-label": `${t("lag")} ${one.partition}` });
			return h("tr", { class: one.stalled ? "bad" : "" },
				several && h("td", {}, one.store), h("th", { scope: "row" }, one.partition, one.stalled && [" ", h("span.tag.bad", {}, t("stalled"))]),
				h("td.number", {}, count(one.lag), " ", meter), h("td.number", {}, one.oldest_seconds === null ? "–" : seconds(one.oldest_seconds)),
				h("td", { title: one.owners.join(", ") }, one.owners.map(short).join(", ") || h("span.tag.bad", {}, t("noOwner"))),
				h("td", { title: one.volume ?? "" }, one.volume ? `${volumes.indexOf(one.volume) + 1} · ${one.volume.slice(0, 8)}` : "–"), h("td.number", {}, `#${one.committed}`));
		});
		fill(this.partitions, h("div.card.flush.scroll", { tabindex: "0", role: "region", "aria-label": t("partitions") },
			h("table.list.dense", {}, h("thead", {}, h("tr", {}, head.map((text) => h("th", { scope: "col", class: numbers.has(text) ? "number" : "" }, text)))), h("tbody", {}, rows))));
	}

	drawIntegrity(volumes) {
		fill(this.integrity, h("div.tiles", {}, volumes.map((one) => {
			const done = one.verified;
			return h("div.tile.card", {}, h("h3", {}, t("volumeName", { name: one.volume.slice(0, 8) })),
				h("p", {}, one.processes.map((process) => `${process.host} · ${short(process.worker)}`).join(", ") || h("span.tag.bad", {}, t("noOwner"))),
				done
					? [h("p", {}, h("span.tag", { class: done.problems ? "bad" : "good" }, done.problems ? t("problemsFound", { n: count(done.problems) }) : t("noProblems"))),
						 h("p.muted.small", {}, t("verifiedAt", { n: count(done.events) }), " ", moment(done.at), ` (${since(done.at)})`)]
					: h("p.muted.small", {}, t("neverVerified"), " ", h("code", {}, "fiq verify")));
		})));
	}
}

/** Shorten the random name of a process. */
const short = (name) => name.replace(/^([0-9a-f]{8})[0-9a-f]{24}$/, "$1");

const tile = (title, value, note, ...more) => h("div.tile.card", {}, h("h3", {}, title), h("p.value", {}, value), h("p.muted.small", {}, note), ...more);

/** Draw a line over the last minutes; the text beside it says the same, so it is hidden from screen readers. */
function chart(points, label, kind = "") {
	const shape = svg("svg", { viewBox: `0 0 ${WIDTH} ${HEIGHT}`, class: `chart ${kind}`, role: "img", "aria-label": t("chartOf", { name: label }), preserveAspectRatio: "none" });
	const highest = Math.max(1, ...points.map((point) => point.value));
	shape.append(svg("line", { x1: 0, y1: HEIGHT - 1, x2: WIDTH, y2: HEIGHT - 1, class: "axis" }));
	if (points.length > 1) {
		const last = points.at(-1).at;
		const place = ({ at, value }) => `${(WIDTH * (1 - (last - at) / WINDOW_SECONDS)).toFixed(1)},${(HEIGHT - 2 - (HEIGHT - 8) * (value / highest)).toFixed(1)}`;
		const line = points.map(place);
		const start = line[0].split(",")[0];
		shape.append(svg("path", { d: `M${start},${HEIGHT - 1} L${line.join(" L")} L${WIDTH},${HEIGHT - 1} Z`, class: "area" }));
		shape.append(svg("polyline", { points: line.join(" "), class: "line" }));
	}
	return h("div.plot", {}, shape, h("span.muted.small", {}, points.length > 1 ? t("highest", { n: rate(Math.max(...points.map((point) => point.value))) }) : "\u00a0"));
}

customElements.define("fi-pipeline", Pipeline);
