/** Making elements, and showing times, numbers and foreign text. Nothing here, or anywhere, parses HTML. */

import { BASE, Problem, session } from "./api.js";
import { language, t } from "./texts.js";

/** Make an element. Names that begin with `on` are listeners; null, undefined and false are left out. */
export function h(tag, attributes = {}, ...children) {
	const [name, ...classes] = tag.split(".");
	const element = document.createElement(name || "div");
	if (classes.length) element.classList.add(...classes);
	for (const [key, value] of Object.entries(attributes)) {
		if (value === null || value === undefined || value === false) continue;
		if (key.startsWith("on")) element.addEventListener(key.slice(2), value);
		else if (key === "class") element.classList.add(...value.split(" ").filter(Boolean));
		else element.setAttribute(key, value === true ? "" : value);
	}
	element.append(...children.flat(4).filter((child) => child !== null && child !== undefined && child !== false));
	return element;
}

const SVG = "http://www.w3.org/2000/svg";

export function svg(tag, attributes = {}, ...children) {
	const element = document.createElementNS(SVG, tag);
	for (const [key, value] of Object.entries(attributes)) element.setAttribute(key, value);
	element.append(...children);
	return element;
}

const ICONS = {
	copy: "M8 8h11v11H8zM5 16V5h11",
	link: "M10 14a4 4 0 0 0 6 0l3-3a4 4 0 0 0-6-6l-1 1M14 10a4 4 0 0 0-6 0l-3 3a4 4 0 0 0 6 6l1-1",
	close: "M6 6l12 12M18 6L6 18",
	eye: "M2 12s4-7 10-7 10 7 10 7-4 7-10 7S2 12 2 12zM12 9a3 3 0 1 0 0 6 3 3 0 0 0 0-6z",
	play: "M7 5l12 7-12 7z",
	pause: "M8 5v14M16 5v14",
	down: "M12 5v14M6 13l6 6 6-6",
	save: "M12 4v11M7 11l5 5 5-5M5 20h14",
	shield: "M12 3l8 3v6c0 5-3.5 8-8 9-4.5-1-8-4-8-9V6zM8.5 12l2.5 2.5 4.5-5",
	code: "M8 7l-5 5 5 5M16 7l5 5-5 5",
	back: "M15 5l-7 7 7 7",
	key: "M14 10a4 4 0 1 0-4 4l1-1h2v-2h2v-1zM15 9l6-6M18 6l2 2",
};

export function icon(name) {
	const shape = svg("svg", { viewBox: "0 0 24 24", class: "icon", "aria-hidden": "true", focusable: "false" });
	shape.append(svg("path", { d: ICONS[name] }));
	return shape;
}

export function button(label, onclick, { kind = "", glyph = null, ...attributes } = {}) {
	return h("button.button", { type: "button", class: kind, onclick, ...attributes }, glyph && icon(glyph), label);
}

export function iconButton(label, glyph, onclick, attributes = {}) {
	return h("button.button.square", { type: "button", "aria-label": label, title: label, onclick, ...attributes }, icon(glyph));
}

export const linkButton = () => iconButton(t("copyLink"), "link", () => copy(location.href));

/** A view's table; `columns` are headings with their classes. */
export const table = (caption, columns, body, kind = "") =>
	h("table.list", { class: kind }, h("caption.offscreen", {}, caption),
		h("thead", {}, h("tr", {}, columns.map(([text, name = ""]) => h("th", { scope: "col", class: name }, text)))), body);

/** Replace the children of an element. */
export const fill = (element, ...children) => {
	element.replaceChildren(...children.flat(4).filter((child) => child !== null && child !== undefined && child !== false));
	return element;
};

// -- foreign text --

/** Controls, marks and overrides of direction, invisible fillers: each is shown by its number, within its own isolate. */
const SPECIAL = /[\u0000-\u0008\u000b-\u001f\u007f-\u009f\u00ad\u061c\u200b\u200e\u200f\u2028-\u202e\u2060-\u206f\ufeff\ufff9-\ufffb]|[\u{e0000}-\u{e007f}]/gu;

/** Append a text that others wrote. Its textContent stays exactly that text. */
export function foreign(element, text) {
	let from = 0;
	for (const found of text.matchAll(SPECIAL)) {
		if (found.index > from) element.append(text.slice(from, found.index));
		const code = `U+${found[0].codePointAt(0).toString(16).toUpperCase().padStart(4, "0")}`;
		const mark = h("span.special", { "data-code": code });
		mark.textContent = found[0];
		element.append(mark);
		from = found.index + found[0].length;
	}
	if (from < text.length) element.append(text.slice(from));
	return element;
}

// -- times and numbers --

export const clock = { utc: false };
const number = new Intl.NumberFormat(language);
const short = new Intl.NumberFormat(language, { maximumSignificantDigits: 3 });
const ago = new Intl.RelativeTimeFormat(language, { numeric: "auto", style: "short" });

export const count = (value) => number.format(value);
export const rate = (value) => (value >= 100 ? number.format(Math.round(value)) : short.format(value));

export function bytes(value) {
	if (value < 1024) return `${number.format(value)} B`;
	const power = Math.min(4, Math.floor(Math.log2(value) / 10));
	return `${short.format(value / 1024 ** power)} ${["", "KiB", "MiB", "GiB", "TiB"][power]}`;
}

export function seconds(value) {
	if (value < 1) return `${Math.round(value * 1000)} ms`;
	if (value < 90) return `${short.format(value)} s`;
	if (value < 5400) return `${Math.round(value / 60)} min`;
	if (value < 172800) return `${Math.round(value / 3600)} h`;
	return `${Math.round(value / 86400)} d`;
}

const two = (value) => String(value).padStart(2, "0");

/** Return the date and the time of day of an ISO time, in local time or UTC, with milliseconds. */
export function parts(iso, utc = clock.utc) {
	const date = new Date(iso);
	const get = (name) => (utc ? date[`getUTC${name}`]() : date[`get${name}`]());
	const day = `${get("FullYear")}-${two(get("Month") + 1)}-${two(get("Date"))}`;
	const time = `${two(get("Hours"))}:${two(get("Minutes"))}:${two(get("Seconds"))}`;
	return { day, time, exact: `${time}.${String(date.getUTCMilliseconds()).padStart(3, "0")}` };
}

export const stamp = (iso, utc = clock.utc) => {
	const { day, exact } = parts(iso, utc);
	return `${day} ${exact}${utc ? " UTC" : ""}`;
};

/** A time of day, and its date unless that is today. */
export function moment(iso) {
	const { day, time } = parts(iso);
	const today = parts(new Date().toISOString()).day;
	return h("time", { datetime: iso, title: `${stamp(iso, false)}\n${stamp(iso, true)}` }, day === today ? time : `${day} ${time}`);
}

export function since(iso) {
	const past = (Date.now() - new Date(iso)) / 1000;
	if (past < 60) return ago.format(-Math.max(0, Math.round(past)), "second");
	if (past < 3600) return ago.format(-Math.round(past / 60), "minute");
	if (past < 86400) return ago.format(-Math.round(past / 3600), "hour");
	return ago.format(-Math.round(past / 86400), "day");
}

// -- messages --

/** A problem with what to do about it. */
export function problemBox(problem, retry = null) {
	const known = problem instanceof Problem;
	const advice = known ? problem.advice : t("doReload");
	return h(
		"div.notice.bad",
		{ role: "alert" },
		h("strong", {}, known ? problem.title : t("failed")),
		h("p", {}, problem.message, known && problem.slug ? [" ", h("code", {}, problem.slug)] : null),
		advice && h("p", {}, advice),
		retry && button(t("again"), retry),
	);
}

export const empty = (title, hint) => h("div.empty", {}, h("p.strong", {}, title), hint && h("p", {}, hint));

let announced = null;

/** Say a short message, also to screen readers. */
export function say(message) {
	announced ??= document.querySelector("#announcer");
	announced.textContent = message;
	announced.classList.add("shown");
	clearTimeout(announced.timer);
	announced.timer = setTimeout(() => announced.classList.remove("shown"), 3000);
}

export async function copy(text) {
	try {
		await navigator.clipboard.writeText(text);
	} catch {
		// plain HTTP beyond loopback has no clipboard
		const area = h("textarea.offscreen", { "aria-hidden": "true", tabindex: "-1" });
		area.value = text;
		(document.querySelector("dialog[open]") ?? document.body).append(area);
		area.select();
		document.execCommand("copy");
		area.remove();
	}
	say(t("copied"));
}

/** Show a modal dialog; it is removed when it closes. */
export function dialog(title, ...children) {
	const id = `dialog-${Math.random().toString(36).slice(2)}`;
	const box = h(
		"dialog",
		{ "aria-labelledby": id, onclose: () => box.remove() },
		h("header.bar", {}, h("h2", { id }, title), iconButton(t("close"), "close", () => box.close())),
		children,
	);
	document.body.append(box);
	box.showModal();
	return box;
}

/** Show the same request as commands that can be copied. */
export function commands(found) {
	const blocks = Object.entries(found).map(([name, text]) =>
		h("section.command", {},
			h("div.bar", {}, h("h3", {}, name), button(t("copy"), () => copy(text), { glyph: "copy", kind: "small", "aria-label": `${t("copy")} ${name}` })),
			h("pre.code", { tabindex: "0", "aria-label": name }, text)),
	);
	dialog(t("asCommand"), session.required && h("p.muted", {}, t("tokenVariable")), ...blocks);
}

export const quoted = (text) => `'${text.replaceAll("'", "'\\''")}'`;

/** Return curl's option with the token. */
export const curlToken = () => (session.required ? ` \\\n  -H "Authorization: Bearer $FIQ_TOKEN"` : "");

/** Return a GET of a URL as commands. */
export function asCommands(href, accept = "") {
	const kind = accept ? ` \\\n  -H ${quoted(`Accept: ${accept}`)}` : "";
	const headers = [
		session.required && '"Authorization": f"Bearer {os.environ[\'FIQ_TOKEN\']}"',
		accept && `"Accept": ${JSON.stringify(accept)}`,
	].filter(Boolean);
	const imports = session.required ? "import os\nimport urllib.request" : "import urllib.request";
	const given = headers.length ? `, headers={${headers.join(", ")}}` : "";
	return {
		curl: `curl -sS ${quoted(href)}${curlToken()}${kind}`,
		Python: `${imports}\n\nrequest = urllib.request.Request(${JSON.stringify(href)}${given})\nwith urllib.request.urlopen(request) as answer:\n    print(answer.read().decode())`,
	};
}

/** Return a program that calls the Python client. */
export function asPython(calls) {
	const [os, token] = session.required ? ["import os\n\n", ', token=os.environ["FIQ_TOKEN"]'] : ["", ""];
	return `${os}from fiq import Client\n\nwith Client("${BASE.href.slice(0, -1)}"${token}) as client:\n    ${calls}`;
}

/** A field with its label above. */
export function field(label, control, hint = null) {
	control.id ||= `field-${Math.random().toString(36).slice(2)}`;
	return h("div.field", {}, h("label", { for: control.id }, label), control, hint && h("small.muted", {}, hint));
}

/** Some buttons of which one is chosen. */
export function choice(label, options, chosen, onchange) {
	const box = h("div.choice", { role: "group", "aria-label": label });
	const mark = (value) => {
		for (const one of box.children) one.setAttribute("aria-pressed", String(one.value === value));
	};
	for (const [value, text] of options) {
		box.append(h("button", { type: "button", value, onclick: () => (mark(value), onchange(value)) }, text));
	}
	mark(chosen);
	return box;
}

// -- following --

/** Return the state of a Follower: whether it runs, an element that says so, and a text that changes with it. */
export function liveState(follower) {
	const state = follower?.state ?? "paused";
	const detail = [];
	if (state === "live" && follower.reconnects) detail.push(t("reconnects", { n: count(follower.reconnects) }));
	if (follower?.lostAt) detail.push(t("lostSince", { time: parts(follower.lostAt.toISOString()).time }), follower.problem?.message);
	const note = detail.filter(Boolean).join(" · ");
	const element = h("span.live", { class: state, role: "status" }, h("span.dot", { "aria-hidden": "true" }), t(`live-${state}`), note && h("span.muted.small", {}, ` ${note}`));
	return { running: state !== "paused" && state !== "failed", element, version: state + note };
}

/** What a line between events says where the connection was lost. */
export const resumedText = (lostAt, position) =>
	t("resumed", { from: parts(lostAt.toISOString()).time, after: seconds((Date.now() - lostAt) / 1000), n: position || 0 });
