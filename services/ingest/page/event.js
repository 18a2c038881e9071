/** One event: how its body reads, and the panel with its way through the pipeline and its body byte for byte. */

import { Problem, text, url } from "./api.js";
import { address } from "./app.js";
import { asCommands, asPython, button, bytes, choice, commands, copy, fill, foreign, h, icon, iconButton, problemBox, stamp } from "./dom.js";
import { compact, indent, members } from "./json.js";
import { t } from "./texts.js";

const SPEAKERS = ["speaker", "role", "author", "sender", "from", "name"];
const TEXTS = ["text", "message", "content", "body", "transcript", "utterance"];
/** characters of a body that a row shows */
export const ROW_LIMIT = 1500;
/** characters of a body that the panel shows before it is asked for all of it */
const PANEL_LIMIT = 200_000;
const encoder = new TextEncoder();

/** Return a record of the service, with its body's raw text as `raw` where it has one. */
export function parseRecord(line) {
	if (!line.includes('"event":')) return JSON.parse(line);
	const found = members(line);
	const record = {};
	for (const [name, value] of found) {
		if (name !== "event") record[name] = JSON.parse(value);
	}
	record.raw = found.get("event");
	if (record.raw !== undefined) {
		record.bytes = encoder.encode(record.raw).length;
		record.event_type = JSON.parse(members(record.raw).get("event_type") ?? '""');
	}
	return record;
}

/** Return how a body reads: speaker and text where it has them, and the rest as raw JSON texts by their names. */
export function reading(raw) {
	const payload = members(raw).get("payload");
	if (payload === undefined) return { speaker: "", text: null, rest: [], json: compact(raw) };
	if (payload[0] === '"') return { speaker: "", text: JSON.parse(payload), rest: [] };
	if (payload[0] !== "{") return { speaker: "", text: null, rest: [], json: compact(payload) };
	const found = members(payload);
	const take = (names) => {
		const name = names.find((one) => found.get(one)?.[0] === '"' && found.get(one) !== '""');
		if (!name) return null;
		const value = JSON.parse(found.get(name));
		found.delete(name);
		return value;
	};
	const said = take(TEXTS);
	if (said === null) return { speaker: "", text: null, rest: [], json: compact(payload) };
	const speaker = take(SPEAKERS) ?? "";
	return { speaker, text: said, rest: [...found].map(([name, value]) => [name, value[0] === '"' ? JSON.parse(value) : compact(value)]) };
}

export function statusMark(record) {
	if (!record.status) return null;
	const text = t(`status-${record.status}`);
	return h("span.status", { class: record.status, title: text }, h("span.offscreen", {}, text));
}

const eventPath = (consultation, record) => `consultations/${consultation}/events/${record.message_id}`;

export function panel(consultation, record, { body, shown, onbody, onclose, conflicts }) {
	const box = h("aside.panel", { "aria-label": t("eventDetails") });
	const way = h("ol.way");
	const content = h("div.body");
	const details = h("dl.details");
	const link = new URL(address(["consultations", consultation], { at: record.sequence, event: record.message_id }), location.href).href;
	fill(box,
		h("header.bar", {}, h("h2", { tabindex: "-1" }, foreign(h("span"), record.event_type || t("event"))),
			iconButton(t("copyLink"), "link", () => copy(link)),
			iconButton(t("commands"), "code", () => commands(eventCommands(consultation, record))),
			iconButton(t("close"), "close", onclose)),
		way, details, content);
	drawWay(way, record);
	drawDetails(details, record, conflicts);
	const load = async (withBody) => {
		try {
			const answer = await text(eventPath(consultation, record), { query: withBody ? {} : { bodies: 0 } });
			const found = parseRecord(answer);
			for (const name of ["stored", "trace_id", "status", "written"]) if (found[name] !== undefined) record[name] = found[name];
			drawWay(way, record);
			drawDetails(details, record, conflicts);
			if (withBody) {
				onbody(record, found.raw);
				drawBody(content, found.raw);
			}
		} catch (problem) {
			if (problem instanceof Problem && problem.status !== 401) fill(content, problemBox(problem, () => load(withBody)));
		}
	};
	const known = body(record);
	if (known !== null) {
		drawBody(content, known);
		load(false);
	} else if (shown) load(true);
	else {
		load(false);
		fill(content, h("div.masked", {}, h("p.muted", {}, t("bodyHidden", { size: bytes(record.bytes) })),
			button(t("showBody"), () => load(true), { glyph: "eye", kind: "primary" }), h("p.muted.small", {}, t("bodyAudited"))));
	}
	return box;
}

function step(done, title, ...detail) {
	return h("li", { class: done ? "done" : "open" }, h("b", {}, title), h("span.muted", {}, ...detail));
}

export function drawWay(way, record) {
	const stored = record.stored ? stamp(record.stored) : t("storedBefore202");
	fill(way,
		step(true, t("wayReceived"), stamp(record.received)),
		step(true, t("wayStored"), `#${record.sequence} · ${stored}`),
		record.status && step(record.written, t("wayPersisted"), record.written ? stamp(record.written) : t("status-queued")));
}

function drawDetails(details, record, conflicts) {
	const row = (name, ...value) => [h("dt", {}, name), h("dd", {}, ...value)];
	fill(details,
		row(t("messageId"), h("code", {}, record.message_id)),
		row(t("sequence"), h("code", {}, String(record.sequence))),
		row(t("localTime"), stamp(record.received, false)),
		row("UTC", h("code", {}, record.received)),
		row(t("size"), bytes(record.bytes)),
		record.trace_id ? row(t("traceId"), h("code", {}, record.trace_id)) : null,
		conflicts ? row(t("conflicts"), h("span.tag.bad", {}, t("conflictsOfKey", { n: conflicts }))) : null);
}

function drawBody(content, raw) {
	const pre = h("pre.code.raw", { tabindex: "0", "aria-label": t("body") });
	let form = "raw";
	let whole = false;
	const more = h("div");
	const draw = () => {
		const shaped = form === "raw" ? raw : indent(raw);
		const cut = !whole && shaped.length > PANEL_LIMIT;
		foreign(fill(pre), cut ? shaped.slice(0, PANEL_LIMIT) : shaped);
		fill(more, cut && button(t("showAll", { size: bytes(encoder.encode(raw).length) }), () => ((whole = true), draw()), { kind: "small" }));
	};
	fill(content,
		h("div.bar", {}, choice(t("form"), [["raw", t("asStored")], ["indented", t("indented")]], form, (value) => ((form = value), draw())),
			button(t("copy"), () => copy(raw), { glyph: "copy", kind: "small" })),
		pre, more);
	draw();
}

function eventCommands(consultation, record) {
	const found = asCommands(url(eventPath(consultation, record)).href);
	found.Python = asPython(`print(client.event("${consultation}", "${record.message_id}"))`);
	return found;
}

/** What is shown where a row's body is hidden. */
export const maskedText = (record, onshow) =>
	h("span.masked", {}, h("span.dots", { "aria-hidden": "true" }, "••••••"), h("span.muted.small", {}, bytes(record.bytes)),
		h("button.link", { type: "button", onclick: onshow }, icon("eye"), t("show")));
