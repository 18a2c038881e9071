/** The list of consultations: by last activity or by name, narrowed by a prefix, kept up to date. */

import { Follower, json, relative, url } from "./api.js";
import { address, remember } from "./app.js";
import { asCommands, button, choice, commands, count, empty, field, fill, h, linkButton, moment, problemBox, say, since, table } from "./dom.js";
import { t } from "./texts.js";

const REFRESH_SECONDS = 5;
const LIMIT = 100;

class Consultations extends HTMLElement {
	connectedCallback() {
		this.gone = new AbortController();
		const signal = this.gone.signal;
		this.order = this.query.get("order") === "name" ? "name" : "activity";
		this.rows = new Map();
		this.input = h("input", {
			type: "search", autocomplete: "off", spellcheck: "false", maxlength: 128, value: this.query.get("prefix") ?? "",
			placeholder: "c-", oninput: () => this.later(),
		});
		this.body = h("tbody");
		this.more = h("div.more");
		this.message = h("div");
		this.status = h("p.muted.small", { role: "status" });
		const order = choice(t("sortedBy"), [["activity", t("byActivity")], ["name", t("byName")]], this.order, (value) => {
			this.order = value;
			this.load();
		});
		const columns = [[t("consultation")], [t("events"), "number"], [t("firstEvent"), "wide"], [t("lastEvent")]];
		this.table = table(t("view-consultations"), columns, this.body);
		fill(this,
			h("div.page", {},
				h("div.bar.wrap", {}, h("h1", { tabindex: "-1" }, t("view-consultations")),
					h("div.actions", {}, button(t("commands"), () => this.commands(), { glyph: "code" }), linkButton())),
				h("form.bar.wrap.tools", { role: "search", onsubmit: (event) => this.open(event) }, field(t("prefix"), this.input), h("div.field", {}, h("span.label", { "aria-hidden": "true" }, t("sortedBy")), order)),
				this.message, h("div.card.flush", {}, this.table), this.more, this.status));
		window.addEventListener("fi-clock", () => this.redraw(), { signal });
		document.addEventListener("visibilitychange", () => this.refresh(), { signal });
		const timer = setInterval(() => this.refresh(), REFRESH_SECONDS * 1000);
		signal.addEventListener("abort", () => clearInterval(timer));
		/** when the events that the list does not count yet were received, by their consultations */
		this.waiting = new Map();
		this.follower = new Follower("events", { bodies: 0 }, "", { onrecords: (found) => this.arrived(found), onstate: () => {} });
		this.load();
		this.follower.start();
	}

	disconnectedCallback() {
		this.gone.abort();
		this.follower.stop();
		clearTimeout(this.typing);
	}

	later() {
		clearTimeout(this.typing);
		this.typing = setTimeout(() => this.load(), 200);
	}

	/** Enter opens the consultation with exactly the id in the field. */
	open(event) {
		event.preventDefault();
		if (this.input.value) location.hash = address(["consultations", this.input.value]);
	}

	path() {
		return ["consultations", { prefix: this.input.value, order: this.order, limit: LIMIT }];
	}

	async load() {
		remember({ prefix: this.input.value, order: this.order === "name" ? "name" : "" });
		this.loading?.abort();
		this.loading = new AbortController();
		this.next = null;
		this.paged = false;
		const [path, query] = this.path();
		await this.fetch(path, query, true);
	}

	async refresh() {
		if (!this.isConnected || document.hidden || this.paged || this.busy || this.loading?.signal.aborted) return;
		const [path, query] = this.path();
		await this.fetch(path, query, true);
	}

	async fetch(path, query, replace) {
		const signal = AbortSignal.any([this.loading.signal, this.gone.signal]);
		this.busy = true;
		this.asked = Date.now();
		try {
			const page = await json(path, { query, signal });
			this.next = page.next;
			if (replace) this.items = page.consultations;
			else this.items.push(...page.consultations);
			fill(this.message);
			this.draw();
		} catch (problem) {
			if (problem.name !== "AbortError") fill(this.message, problemBox(problem, () => this.load()));
		} finally {
			this.busy = false;
		}
	}

	/** Events came: until the list has them, they wait for HDF5. */
	arrived(found) {
		for (const one of found) {
			const { consultation_id: id, received } = JSON.parse(one.data);
			if (!id.startsWith(this.input.value)) continue;
			if (!this.waiting.has(id)) this.waiting.set(id, []);
			this.waiting.get(id).push(received);
		}
		// at most so often, however many events come
		this.soon ??= setTimeout(() => {
			this.soon = null;
			if (this.items && this.isConnected) this.draw();
			if (Date.now() - this.asked > 2000) this.refresh();
		}, 500);
	}

	/** Return the items with what waits, those that the list does not have first. */
	withWaiting() {
		const known = new Map(this.items.map((item) => [item.consultation_id, item]));
		const unknown = [];
		for (const [id, times] of this.waiting) {
			const item = known.get(id);
			const left = item ? times.filter((received) => received > item.last_received) : times;
			if (!left.length || (!item && this.order === "name")) this.waiting.delete(id);
			else {
				this.waiting.set(id, left);
				if (!item) unknown.push({ consultation_id: id, events: 0, first_received: left[0], last_received: left.at(-1) });
			}
		}
		const item = (one) => ({ ...one, waiting: this.waiting.get(one.consultation_id)?.length ?? 0 });
		return [...unknown.reverse(), ...this.items].map(item);
	}

	async loadMore() {
		this.paged = true;
		const before = this.items.length;
		await this.fetch(relative(this.next), undefined, false);
		say(t("loaded", { n: count(this.items.length - before) }));
	}

	redraw() {
		this.rows.clear();
		if (this.items) this.draw();
	}

	draw() {
		const rows = this.withWaiting().map((item) => {
			const known = this.rows.get(item.consultation_id);
			const version = JSON.stringify(item);
			if (known?.version === version) {
				known.refresh();
				return known.element;
			}
			const made = this.row(item);
			this.rows.set(item.consultation_id, { ...made, version });
			return made.element;
		});
		// rows that are where they belong are left alone: they may have the focus
		rows.forEach((row, index) => {
			if (this.body.children[index] !== row) this.body.insertBefore(row, this.body.children[index] ?? null);
		});
		while (this.body.children.length > rows.length) this.body.lastChild.remove();
		this.table.hidden = !rows.length;
		const none = this.input.value ? empty(t("noneWithPrefix"), t("noneWithPrefixHint")) : empty(t("noConsultations"), t("noConsultationsHint"));
		fill(this.more, rows.length ? this.next && button(t("more"), () => this.loadMore()) : none);
		const shown = t("shown", { n: count(rows.length) });
		this.status.textContent = !rows.length ? "" : this.order === "activity" ? `${shown} · ${t("activityBound")}` : shown;
	}

	row(item) {
		const id = item.consultation_id;
		const ago = h("span.muted.ago");
		const refresh = () => (ago.textContent = item.last_received ? since(item.last_received) : "");
		refresh();
		const element = h("tr", {},
			h("th", { scope: "row" }, h("a", { href: address(["consultations", id]) }, id)),
			h("td.number", {}, item.events === undefined ? "" : count(item.events),
				item.waiting ? [" ", h("span.tag.warn", { title: t("waitingHint") }, t("waiting", { n: count(item.waiting) }))] : null),
			h("td.wide", {}, item.first_received ? moment(item.first_received) : ""),
			h("td", {}, item.last_received ? [moment(item.last_received), " ", ago] : ""));
		return { element, refresh };
	}

	commands() {
		const [path, query] = this.path();
		commands(asCommands(url(path, query).href));
	}
}

customElements.define("fi-consultations", Consultations);
