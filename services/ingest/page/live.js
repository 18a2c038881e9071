/** All consultations, live: the newest events as they come, without bodies. */

import { Follower, url } from "./api.js";
import { address } from "./app.js";
import { asCommands, button, bytes, clock, commands, count, empty, fill, foreign, h, linkButton, liveState, parts, problemBox, resumedText, stamp, table } from "./dom.js";
import { t } from "./texts.js";

/** rows that are kept, and ids in which a retry is recognised */
const KEPT = 200;
const REMEMBERED = 10_000;

class Live extends HTMLElement {
	connectedCallback() {
		this.gone = new AbortController();
		this.count = 0;
		this.body = h("tbody");
		this.bar = h("div.livebar.top");
		this.message = h("div.messages");
		this.none = h("div", {}, empty(t("nothingYet"), t("nothingYetHint")));
		const columns = [[t("time")], [t("consultation")], [t("eventType")], [t("size"), "number"], [t("sequence"), "number wide"]];
		this.table = table(t("view-live"), columns, this.body, "live");
		fill(this, h("div.page", {},
			h("div.bar.wrap", {}, h("h1", { tabindex: "-1" }, t("view-live")),
				h("div.actions", {}, button(t("commands"), () => commands(asCommands(url("events", { follow: 1, bodies: 0 }).href, "text/event-stream")), { glyph: "code" }),
					linkButton())),
			this.message, h("div.card.flush", {}, this.bar, this.table, this.none)));
		window.addEventListener("fi-clock", () => this.redraw(), { signal: this.gone.signal });
		this.records = [];
		this.seen = new Set();
		// without a position the service begins with what comes from now on
		this.follower = new Follower("events", { bodies: 0 }, this.query.get("after") ?? "", {
			onrecords: (found) => this.add(found),
			onstate: () => this.drawBar(),
		});
		this.follower.onresumed = (lostAt, position) => {
			if (lostAt) this.insert([{ mark: resumedText(lostAt, position) }]);
		};
		this.follower.start();
	}

	disconnectedCallback() {
		clearTimeout(this.frame);
		this.gone.abort();
		this.follower.stop();
	}

	add(found) {
		this.count += found.length;
		const records = found.slice(-KEPT).map((one) => JSON.parse(one.data));
		for (const record of records) {
			const id = record.consultation_id + record.message_id;
			record.again = this.seen.has(id);
			this.seen.add(id);
		}
		for (const id of this.seen) if (this.seen.size > REMEMBERED) this.seen.delete(id);
		this.insert(records);
		this.drawBar();
	}

	insert(records) {
		this.pending = [...(this.pending ?? []), ...records].slice(-KEPT);
		// at most so often, however many events come
		this.frame ??= setTimeout(() => {
			this.frame = null;
			const fresh = this.pending.reverse();
			this.pending = [];
			this.records = [...fresh, ...this.records].slice(0, KEPT);
			this.body.prepend(...fresh.map((record) => this.row(record)));
			while (this.body.children.length > KEPT) this.body.lastChild.remove();
			this.none.hidden = true;
		}, 400);
	}

	redraw() {
		fill(this.body, this.records.map((record) => this.row(record)));
	}

	row(record) {
		if (record.mark) return h("tr.gap", {}, h("td", { colspan: 5 }, record.mark));
		const { exact } = parts(record.received);
		const link = address(["consultations", record.consultation_id], { at: record.sequence, event: record.message_id });
		return h("tr", {},
			h("td", {}, h("time", { datetime: record.received, title: stamp(record.received, !clock.utc) }, exact)),
			h("th", { scope: "row" }, h("a", { href: link }, record.consultation_id)),
			h("td", {}, foreign(h("span.tag"), record.event_type), record.again && [" ", h("span.tag.warn", { title: t("retryHint") }, t("retry"))]),
			h("td.number", {}, bytes(record.bytes)),
			h("td.number.wide", {}, h("code", {}, `#${record.sequence}`)));
	}

	drawBar() {
		const { state, problem } = this.follower;
		const { running, element, version } = liveState(this.follower);
		this.counter ??= h("span.muted.small");
		this.counter.textContent = t("arrived", { n: count(this.count) });
		if (version === this.version) return;
		this.version = version;
		fill(this.bar, element, this.counter, h("span.grow"),
			running ? button(t("pause"), () => this.follower.stop(), { glyph: "pause", kind: "small" }) : button(t("resume"), () => this.follower.start(), { glyph: "play", kind: "small" }));
		fill(this.message, state === "failed" && problemBox(problem));
		if (state === "failed" && problem.slug === "position-gone") {
			this.insert([{ mark: t("positionGone", { n: this.follower.position }) }]);
			this.follower.position = "";
			this.follower.start();
		}
	}
}

customElements.define("fi-live", Live);
