/**
 * One consultation: as a dialogue or as raw JSON, filtered, looked up, followed live, verified and exported.
 *
 * Records come without bodies. Bodies come for the rows in view, once the user has asked to see them: the service writes
 * each such read to its audit log.
 */

import { CONFIG, Follower, Problem, json, relative, text, url } from "./api.js";
import { address, remember } from "./app.js";
import { asCommands, asPython, button, bytes, choice, clock, commands, count, dialog, empty, field, fill, foreign, h, icon, iconButton, linkButton, liveState, parts, problemBox, resumedText, stamp } from "./dom.js";
import { ROW_LIMIT, drawWay, maskedText, panel, parseRecord, reading, statusMark } from "./event.js";
import { openExport } from "./export.js";
import { VirtualList } from "./list.js";
import { t } from "./texts.js";

const PAGE = 1000;
/** events that are read without being scrolled to */
const AHEAD = 10_000;
/** kept bodies, bytes */
const KEPT_BYTES = 32 << 20;
/** events of a read with bodies */
const BODIES = 100;
const STATUS_SECONDS = 1;
const DRAW_MS = 250;
const NEWEST = "9223372036854775807";
const USUAL_TYPE = "MESSAGE_RECEIVED";

class Consultation extends HTMLElement {
	connectedCallback() {
		this.id_ = this.rest[0];
		this.home = `consultations/${encodeURIComponent(this.id_)}`;
		this.path = `${this.home}/events`;
		this.gone = new AbortController();
		const signal = this.gone.signal;
		const get = (name) => this.query.get(name) ?? "";
		this.form = get("view") === "json" ? "json" : "dialogue";
		this.filter = { type: get("type"), since: get("since"), until: get("until") };
		this.at = Number(get("at")) || 0;
		this.from = get("from") === "end" ? "end" : "start";
		this.live = get("live") !== "0";
		this.selected = get("event");
		this.shown = CONFIG.bodies === "shown";
		this.bodies = new Map();
		this.bodiesSize = 0;
		this.speakers = new Map();
		this.conflicts = new Map();
		this.list = new VirtualList({
			label: t("events"),
			render: (item, index) => this.row(item, index),
			key: (item) => item.key,
			onscroll: (first, last) => this.scrolled(first, last),
		});
		this.build();
		const timer = setInterval(() => this.refreshStatus(), STATUS_SECONDS * 1000);
		signal.addEventListener("abort", () => clearInterval(timer));
		window.addEventListener("fi-clock", () => this.list.redraw(), { signal });
		this.addEventListener("keydown", (event) => event.key === "Escape" && this.closePanel());
		this.load();
		this.loadConflicts();
	}

	disconnectedCallback() {
		this.gone.abort();
		this.loading?.abort();
		this.follower?.stop();
		this.list.close();
	}

	// -- the frame ------------------------------------------------------------------------------------------------------

	build() {
		this.summary = h("p.muted.small.summary", { role: "status" });
		this.message = h("div.messages");
		this.result = h("div.messages");
		this.side = h("div.side", { hidden: true });
		this.conflictButton = h("span");
		this.liveBar = h("div.livebar");
		this.none = h("div");
		this.types = h("datalist", { id: "types" });
		this.knownTypes = new Set();
		this.toggle = button(t("showBodies"), () => this.toggleBodies(), { glyph: "eye", "aria-pressed": String(this.shown) });
		const write = (name) => (value) => {
			this.filter[name] = value;
			this.restart();
		};
		const type = h("input", { type: "text", list: "types", value: this.filter.type, autocomplete: "off", spellcheck: "false", onchange: (event) => write("type")(event.target.value.trim()) });
		const time = (name) => {
			const input = h("input", { type: "datetime-local", step: "1", onchange: (event) => write(name)(isoOf(event.target.value)) });
			if (this.filter[name]) input.value = localOf(this.filter[name]);
			return input;
		};
		const lookup = h("input", { type: "search", autocomplete: "off", spellcheck: "false", placeholder: t("lookupHint") });
		const form = h("form.lookup", { role: "search", onsubmit: (event) => (event.preventDefault(), this.lookUp(lookup.value.trim())) }, field(t("lookup"), lookup));
		const filters = h("details.filters", { open: Boolean(this.filter.type || this.filter.since || this.filter.until) },
			h("summary", {}, t("filter")),
			h("div.bar.wrap", {}, field(t("eventType"), type), this.types, field(t("since"), time("since")), field(t("until_"), time("until")),
				button(t("clear"), () => {
					this.filter = { type: "", since: "", until: "" };
					for (const input of filters.querySelectorAll("input")) input.value = "";
					this.restart();
				}, { kind: "small" })));
		fill(this,
			h("div.page.tall", {},
				h("div.bar.wrap.head", {},
					h("a.back", { href: "#/consultations", "aria-label": t("toConsultations"), title: t("toConsultations") }, icon("back")),
					h("h1", { tabindex: "-1" }, this.id_), this.summary,
					h("div.actions", {}, this.conflictButton, button(t("verify"), () => this.verify(), { glyph: "shield" }),
						button(t("export"), () => openExport(this.id_, this.serverFilter(), this.filter.until, this.shown), { glyph: "save" }),
						iconButton(t("commands"), "code", () => this.commands()), linkButton())),
				h("div.bar.wrap.tools", {},
					choice(t("form"), [["dialogue", t("dialogue")], ["json", "JSON"]], this.form, (value) => this.setForm(value)),
					this.toggle, form, filters),
				this.result, this.message,
				h("div.split", {}, h("div.events.card.flush", {}, this.none, this.list.element, this.liveBar), this.side)));
	}

	serverFilter() {
		return { type: this.filter.type, since: this.filter.since };
	}

	keep() {
		remember({
			view: this.form === "json" ? "json" : "", ...this.filter, at: this.at || "", event: this.selected,
			from: this.from === "end" ? "end" : "", live: this.live ? "" : "0",
		});
	}

	setForm(form) {
		this.form = form;
		this.keep();
		this.list.redraw();
	}

	toggleBodies() {
		this.shown = !this.shown;
		this.toggle.setAttribute("aria-pressed", String(this.shown));
		if (!this.shown) this.forgetBodies();
		this.list.redraw();
	}

	forgetBodies() {
		this.bodies.clear();
		this.bodiesSize = 0;
	}

	restart() {
		this.at = 0;
		this.selected = "";
		this.closePanel();
		this.load();
	}

	// -- reading --------------------------------------------------------------------------------------------------------

	async load() {
		this.keep();
		this.loading?.abort();
		this.loading = new AbortController();
		this.follower?.stop();
		this.follower = null;
		this.bySequence = new Map();
		this.byId = new Map();
		this.queued = new Set();
		this.complete = false;
		this.previous = null;
		this.marks = 0;
		this.list.reset([]);
		fill(this.none);
		fill(this.message);
		const base = { ...this.serverFilter(), bodies: 0, limit: PAGE };
		const query = (range) => url(this.path, { ...base, ...range }).href;
		if (this.at) {
			this.next = query({ after: this.at - 1 });
			this.previous = query({ before: this.at, limit: 100 });
		} else if (this.from === "end") {
			this.next = null;
			this.previous = query({ before: NEWEST });
		} else this.next = query({ after: 0 });
		await this.attempt(async (signal) => {
			if (this.next) await this.forward(signal);
			if (this.previous) await this.backward(signal);
			if (!this.at && this.from === "end") this.list.toEnd();
			if (this.at) this.goTo(this.at);
		});
		await this.ahead();
	}

	/** Run a read; show its problem with a button to go on. */
	async attempt(read, again = () => this.ahead()) {
		const signal = this.loading.signal;
		try {
			await read(signal);
			if (!signal.aborted) fill(this.message);
		} catch (problem) {
			if (problem.name === "AbortError" || signal.aborted) return false;
			fill(this.message, problemBox(problem, () => (this.list.items.length ? again() : this.load())));
			return false;
		}
		return true;
	}

	/** Read on to the end, or as far as AHEAD; then follow. */
	async ahead() {
		if (this.reading) return;
		this.reading = true;
		try {
			while (this.next && this.list.items.length < AHEAD + (this.wanted ?? 0)) {
				if (!(await this.attempt((signal) => this.forward(signal)))) return;
			}
		} finally {
			this.reading = false;
		}
		if (!this.next && !this.complete && !this.loading.signal.aborted) this.completed();
	}

	completed() {
		this.complete = true;
		this.drawSummary();
		if (!this.list.items.length) this.drawNone();
		if (this.live && !this.filter.until) this.follow();
		else this.drawLive();
	}

	async forward(signal) {
		const page = await json(this.next, { signal });
		if (signal.aborted) return;
		this.next = page.next ? url(relative(page.next)).href : null;
		const found = this.take(page.events);
		if (page.events.length && !found.length && this.filter.until) this.next = null;
		this.list.append(found);
		this.drawSummary();
	}

	async backward(signal) {
		const page = await json(this.previous, { signal });
		if (signal.aborted) return;
		this.previous = page.previous ? url(relative(page.previous)).href : null;
		this.list.prepend(this.take(page.events));
		this.drawSummary();
	}

	/** Return the items of new records. */
	take(records) {
		const items = [];
		for (const record of records) {
			if (this.bySequence.has(record.sequence)) continue;
			if (this.filter.until && record.received > this.filter.until) continue;
			const item = { key: record.sequence, record };
			this.bySequence.set(record.sequence, item);
			this.byId.set(record.message_id, item);
			if (record.status === "queued") this.queued.add(record.sequence);
			if (!this.knownTypes.has(record.event_type) && this.knownTypes.size < 100) {
				this.knownTypes.add(record.event_type);
				this.types.append(h("option", { value: record.event_type }));
			}
			items.push(item);
		}
		return items;
	}

	scrolled(first, last) {
		const near = 40;
		if (first < near && this.previous && !this.readingBack && this.bySequence.size) {
			this.readingBack = true;
			this.attempt((signal) => this.backward(signal)).finally(() => (this.readingBack = false));
		}
		if (last > this.list.items.length - PAGE && this.next && !this.reading && this.list.items.length >= AHEAD) {
			this.wanted = this.list.items.length - AHEAD + PAGE;
			this.ahead();
		}
		if (this.shown) {
			clearTimeout(this.settling);
			this.settling = setTimeout(() => this.loadBodies(), 60);
		}
	}

	drawSummary() {
		const items = this.list.items.filter((item) => item.record);
		if (!items.length) return fill(this.summary);
		const [first, last] = [items[0].record, items.at(-1).record];
		const whole = !this.previous && !this.next;
		const total = t(whole ? "eventsAll" : "eventsLoaded", { n: count(items.length) });
		const waiting = this.queued.size ? ` · ${t("waiting", { n: count(this.queued.size) })}` : "";
		return fill(this.summary, `${total}${waiting} · ${stamp(first.received).slice(0, 19)} – ${stamp(last.received).slice(0, 19)}`);
	}

	drawNone() {
		const filtered = this.filter.type || this.filter.since || this.filter.until;
		fill(this.none, filtered ? empty(t("noneMatches"), t("noneMatchesHint")) : empty(t("noEvents"), t("noEventsHint")));
	}

	// -- bodies ---------------------------------------------------------------------------------------------------------

	body(record) {
		return this.bodies.get(record.sequence) ?? null;
	}

	keepBody(sequence, raw) {
		if (!this.bodies.has(sequence)) this.bodiesSize += raw.length;
		this.bodies.set(sequence, raw);
		for (const [old, text] of this.bodies) {
			if (this.bodiesSize <= KEPT_BYTES || this.bodies.size <= BODIES) break;
			this.bodies.delete(old);
			this.bodiesSize -= text.length;
		}
	}

	/** Read the bodies of the rows in view. */
	async loadBodies() {
		if (this.busyBodies || !this.shown) return;
		const missing = [...this.list.shown.values()]
			.map((element) => this.list.items[Number(element.dataset.index)])
			.filter((item) => item?.record && !this.bodies.has(item.record.sequence))
			.map((item) => item.record.sequence)
			.sort((one, other) => one - other);
		if (!missing.length) return;
		this.busyBodies = true;
		const query = { ...this.serverFilter(), after: missing[0] - 1, before: missing.at(-1) + 1, limit: BODIES };
		const done = await this.attempt(async (signal) => {
			const answer = await text(this.path, { query, headers: { Accept: "application/x-ndjson" }, signal });
			for (const line of answer.split("\n").filter(Boolean)) {
				const record = parseRecord(line);
				this.keepBody(record.sequence, record.raw);
				const item = this.bySequence.get(record.sequence);
				if (item) this.list.refresh(item);
			}
		}, () => this.loadBodies());
		this.busyBodies = false;
		if (done && this.shown) this.loadBodies();
	}

	async showOne(item) {
		await this.attempt(async (signal) => {
			const answer = await text(`${this.path}/${item.record.message_id}`, { signal });
			this.keepBody(item.record.sequence, parseRecord(answer).raw);
			this.list.refresh(item);
		}, () => this.showOne(item));
	}

	// -- rows -----------------------------------------------------------------------------------------------------------

	row(item, index) {
		if (item.mark) return h("div.mark", { role: "article", class: item.kind }, item.mark);
		const { record } = item;
		const raw = this.body(record);
		const { day, time, exact } = parts(record.received);
		const before = this.list.items[index - 1]?.record;
		const newDay = !before || parts(before.received).day !== day;
		const conflicts = this.conflicts.get(record.message_id);
		const element = h(
			"article.event",
			{
				class: `${record.message_id === this.selected ? "selected" : ""} ${this.form}`,
				"aria-label": `#${record.sequence} ${record.event_type} ${exact}`,
				onclick: (event) => this.clicked(event, item),
				onkeydown: (event) => {
					if (event.key === "Enter" && event.target === element) this.select(item);
				},
			},
			newDay && h("div.day", {}, `${day}${clock.utc ? " UTC" : ""}`),
			h("div.meta", {}, h("time", { datetime: record.received, title: `${stamp(record.received, false)}\n${stamp(record.received, true)}` }, time), statusMark(record)),
			h("div.said", {}, this.content(item, raw), conflicts && h("span.tag.bad", {}, t("conflictsOfKey", { n: conflicts }))),
			h("button.button.square.open", { type: "button", "aria-label": t("detailsOf", { n: record.sequence }), onclick: () => this.select(item) }, "›"));
		return element;
	}

	content(item, raw) {
		const { record } = item;
		const type = record.event_type && (raw === null || (record.event_type !== USUAL_TYPE && this.form !== "json")) ? foreign(h("span.tag"), record.event_type) : null;
		if (raw === null) return [type, this.shown ? h("span.muted.small.pending", {}, t("loading")) : maskedText(record, (event) => (event.stopPropagation(), this.showOne(item)))];
		if (this.form === "json") return [type, this.cut(h("code.json", { dir: "ltr" }), raw, item)];
		const { speaker, text: said, rest, json: other } = reading(raw);
		if (said === null) return [type, this.cut(h("code.json", { dir: "ltr" }), other, item)];
		return [
			speaker && h("b.speaker", { class: `s${this.colour(speaker)}` }, foreign(h("bdi"), speaker)),
			type,
			rest.map(([name, value]) => h("span.extra", {}, foreign(h("bdi"), name), " ", foreign(h("bdi"), value.slice(0, 200)))),
			this.cut(h("p.text", { dir: "auto" }), said, item),
		];
	}

	cut(element, whole, item) {
		if (whole.length <= ROW_LIMIT) return foreign(element, whole);
		foreign(element, whole.slice(0, ROW_LIMIT));
		return [element, h("button.link", { type: "button", onclick: () => this.select(item) }, t("showAll", { size: bytes(item.record.bytes) }))];
	}

	colour(speaker) {
		if (!this.speakers.has(speaker)) this.speakers.set(speaker, this.speakers.size % 6);
		return this.speakers.get(speaker);
	}

	clicked(event, item) {
		if (event.target.closest("button, a") || !getSelection().isCollapsed) return;
		this.select(item);
	}

	// -- one event ------------------------------------------------------------------------------------------------------

	select(item, focus = true) {
		const before = this.byId.get(this.selected);
		this.selected = item.record.message_id;
		this.at = item.record.sequence;
		this.keep();
		if (before) this.list.refresh(before);
		this.list.refresh(item);
		const box = panel(this.id_, item.record, {
			body: (record) => this.body(record),
			shown: this.shown,
			conflicts: this.conflicts.get(item.record.message_id),
			onbody: (record, raw) => {
				this.keepBody(record.sequence, raw);
				this.list.refresh(item);
			},
			onclose: () => this.closePanel(),
		});
		this.side.hidden = false;
		fill(this.side, box);
		if (focus) box.querySelector("h2").focus();
	}

	closePanel() {
		if (this.side.hidden) return;
		this.side.hidden = true;
		fill(this.side);
		const item = this.byId.get(this.selected);
		this.selected = "";
		this.at = 0;
		this.keep();
		if (!item) return;
		this.list.refresh(item);
		this.list.shown.get(item.key)?.focus({ preventScroll: true });
	}

	/** Go to a sequence among what is loaded; the event of the address opens. */
	goTo(sequence) {
		let index = this.list.items.findIndex((item) => item.record && item.record.sequence >= sequence);
		if (index < 0) index = this.list.items.length - 1;
		if (index < 0) return;
		this.list.show(index, false);
		const item = this.list.items[index];
		if (this.selected && item.record.message_id === this.selected) this.select(item, false);
		else this.list.shown.get(item.key)?.focus({ preventScroll: true });
	}

	async lookUp(wanted) {
		if (!wanted) return;
		await this.attempt(async (signal) => {
			const query = /^\d{1,19}$/.test(wanted) ? { after: Number(wanted) - 1, limit: 1 } : { key: wanted };
			const page = await json(this.path, { query: { ...query, bodies: 0 }, signal });
			const found = page.events[0];
			const exact = found && (query.key || found.sequence === Number(wanted));
			if (!exact) {
				fill(this.result, h("div.notice", { role: "status" }, h("p", {}, t("notFound")), button(t("close"), () => fill(this.result), { kind: "small" })));
				return;
			}
			fill(this.result);
			const known = this.byId.get(found.message_id);
			if (known) {
				this.list.show(this.list.items.indexOf(known), false);
				this.select(known);
				return;
			}
			this.filter = { type: "", since: "", until: "" };
			this.at = found.sequence;
			this.selected = found.message_id;
			this.load();
		}, () => this.lookUp(wanted));
	}

	// -- live -----------------------------------------------------------------------------------------------------------

	follow(after = null) {
		const last = this.list.items.findLast((item) => item.record)?.record.sequence ?? 0;
		const arrived = [];
		const draw = () => {
			// what another follower or a new load reads again is not drawn twice
			if (this.follower !== follower) return;
			fill(this.none);
			this.list.append(this.take(arrived.splice(0)), true);
			this.drawSummary();
			this.drawLive();
		};
		const follower = new Follower(this.path, { ...this.serverFilter(), bodies: 0 }, after ?? last, {
			onrecords: (found) => {
				// at most so often, however many events come
				if (!arrived.length) setTimeout(draw, DRAW_MS);
				arrived.push(...found.map((one) => JSON.parse(one.data)));
			},
			onstate: () => this.drawLive(),
		});
		this.follower = follower;
		follower.onresumed = (lostAt, position) => {
			if (lostAt) this.mark(resumedText(lostAt, position), "gap");
		};
		follower.start();
	}

	mark(text, kind) {
		this.marks += 1;
		this.list.append([{ key: `mark-${this.marks}`, mark: text, kind }], true);
	}

	pause() {
		this.live = false;
		this.keep();
		this.follower.stop();
		this.drawLive();
	}

	resume(from = null) {
		this.live = true;
		this.from = "start";
		this.keep();
		if (from === null && this.follower) this.follower.start();
		else this.follow(from);
	}

	newest() {
		this.from = "end";
		this.restart();
	}

	drawLive() {
		const follower = this.follower;
		const { running, element, version: state } = liveState(follower);
		const version = state + this.complete;
		if (follower) this.position ??= h("code");
		if (follower) this.position.textContent = `#${follower.position}`;
		if (version === this.liveVersion) return;
		this.liveVersion = version;
		const from = h("input", { type: "number", min: 0, class: "position", "aria-label": t("resumeAfter"), placeholder: "#" });
		fill(this.liveBar,
			element,
			follower ? h("span.muted.small", {}, t("position"), " ", this.position) : null,
			h("span.grow"),
			running
				? button(t("pause"), () => this.pause(), { glyph: "pause", kind: "small" })
				: this.complete && [
						h("form.bar", { onsubmit: (event) => (event.preventDefault(), this.resume(from.value === "" ? null : Number(from.value))) }, from,
							h("button.button.small", { type: "submit" }, icon("play"), t("resume"))),
					],
			iconButton(t("newest"), "down", () => (this.complete ? this.list.toEnd() : this.newest())));
		if (follower?.state === "failed") fill(this.message, problemBox(follower.problem));
	}

	/** Ask again for events that wait in the log, until they are in HDF5. */
	async refreshStatus() {
		if (!this.queued?.size || document.hidden || this.asking) return;
		this.asking = true;
		const waiting = [...this.queued].sort((one, other) => one - other);
		const query = { bodies: 0, after: waiting[0] - 1, before: waiting.at(-1) + 1, limit: PAGE };
		try {
			const page = await json(this.path, { query, signal: this.gone.signal });
			for (const found of page.events) {
				const item = this.bySequence.get(found.sequence);
				if (!item || !found.written) continue;
				item.record.status = found.status;
				item.record.written = found.written;
				if (this.selected === item.record.message_id) drawWay(this.side.querySelector(".way"), item.record);
				this.queued.delete(found.sequence);
				this.list.refresh(item);
			}
			this.drawSummary();
		} catch (problem) {
			// the live bar shows what is wrong; the next second asks again
			if (!(problem instanceof Problem) && problem.name !== "AbortError") throw problem;
		} finally {
			this.asking = false;
		}
	}

	// -- integrity ------------------------------------------------------------------------------------------------------

	async verify() {
		fill(this.result, h("div.notice", { role: "status" }, t("verifying")));
		try {
			const found = await json(`${this.home}/verification`, { signal: this.gone.signal });
			const { result, events, checked, first_damaged_sequence: first } = found;
			const sound = result !== "damaged";
			const text = t(`chain-${result}`, { n: count(events), checked: count(checked), first: first ?? "?" });
			fill(this.result, h("div.notice.bar", { class: sound ? "good" : "bad", role: "status" }, icon("shield"), h("p.grow", {}, text, found.first_problems.map((one) => foreign(h("span.muted.small"), ` ${one.message}`))), button(t("close"), () => fill(this.result), { kind: "small" })));
		} catch (problem) {
			if (problem.name !== "AbortError") fill(this.result, problemBox(problem, () => this.verify()));
		}
	}

	async loadConflicts() {
		try {
			const page = await json(`${this.home}/conflicts`, { query: { bodies: 0 }, signal: this.gone.signal });
			this.found = page.conflicts;
		} catch (problem) {
			if (problem instanceof Problem || problem.name === "AbortError") return;
			throw problem;
		}
		if (!this.found?.length) return;
		for (const one of this.found) this.conflicts.set(one.message_id, (this.conflicts.get(one.message_id) ?? 0) + 1);
		fill(this.conflictButton, button(t("conflictCount", { n: count(this.found.length) }), () => this.openConflicts(), { kind: "warn" }));
		this.list.redraw();
	}

	openConflicts() {
		const body = h("tbody");
		const draw = (found) =>
			fill(body, found.map((one) =>
				h("tr", {}, h("td", {}, `#${one.sequence}`), h("td", {}, stamp(one.received)), h("td", {}, h("code", {}, one.message_id)),
					h("td.wrapped", {}, one.raw === undefined ? [foreign(h("span.tag"), one.event_type), " ", bytes(one.bytes)] : foreign(h("code", { dir: "ltr" }), one.raw)))));
		const show = async () => {
			const answer = await text(`${this.home}/conflicts`, { headers: { Accept: "application/x-ndjson" }, query: { limit: PAGE } });
			draw(answer.split("\n").filter(Boolean).map(parseRecord));
		};
		const head = [t("sequence"), t("time"), t("messageId"), t("body")].map((name) => h("th", { scope: "col" }, name));
		const place = h("div");
		const ask = () => show().catch((problem) => fill(place, problemBox(problem, ask)));
		draw(this.found);
		const box = dialog(t("conflicts"), h("p.muted", {}, t("conflictsHint")),
			h("div.scroll", { tabindex: "0", role: "region", "aria-label": t("conflicts") }, h("table.list.dense", {}, h("thead", {}, h("tr", {}, head)), body)),
			place, h("div.bar.wrap", {}, button(t("showBodies"), ask, { glyph: "eye" }), h("span.muted.small", {}, t("bodyAudited"))));
		box.classList.add("large");
	}

	commands() {
		const href = url(this.path, { ...this.serverFilter(), limit: PAGE }).href;
		const found = asCommands(href, "application/x-ndjson");
		found.Python = asPython(`for event in client.read("${this.id_}"):\n        print(event.sequence, event.received, event.event)`);
		commands(found);
	}
}

const isoOf = (value) => (value ? new Date(clock.utc ? `${value}Z` : value).toISOString() : "");

function localOf(iso) {
	const { day, time } = parts(iso);
	return `${day}T${time}`;
}

customElements.define("fi-consultation", Consultation);
