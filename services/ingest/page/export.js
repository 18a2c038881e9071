/** Saves the events that are shown as NDJSON or CSV: page after page, so that no more than one is in memory as text. */

import { Problem, call, relative } from "./api.js";
import { button, bytes, count, dialog, fill, h, problemBox } from "./dom.js";
import { parseRecord, reading } from "./event.js";
import { t } from "./texts.js";

/** The first are named as `fiq export` names them. */
const COLUMNS = ["consultation", "sequence", "event_id", "received", "event_type", "status", "written", "bytes", "speaker", "text", "event"];

/** Without it a spreadsheet takes UTF-8 for the machine's old encoding. */
const BYTE_ORDER_MARK = "\ufeff";
/** What a spreadsheet takes for a formula, or for a number of which it keeps 15 digits. `fiq export` has the same rule. */
const UNSAFE = /^[=+\-@\t\r\n＝＋－＠]|^\d{16,}$/;

/** Return a cell that a spreadsheet shows as it is: the apostrophe makes it a text. */
function cell(value) {
	const text = String(value ?? "");
	const safe = UNSAFE.test(text) ? `'${text}` : text;
	return /[",\n\r']/.test(safe) ? `"${safe.replaceAll('"', '""')}"` : safe;
}

function csvLine(consultation, line) {
	const record = parseRecord(line);
	const { speaker, text } = record.raw === undefined ? {} : reading(record.raw);
	const values = { ...record, consultation, event_id: record.message_id, speaker, text, event: record.raw };
	return `${COLUMNS.map((name) => cell(values[name])).join(",")}\r\n`;
}

/** Ask for the form, and save. `query` and `until` choose the events, as in the view. */
export function openExport(consultation, query, until, shown) {
	const box = dialog(t("export"));
	const stop = new AbortController();
	box.addEventListener("close", () => stop.abort());
	const bodies = h("input", { type: "checkbox", id: "export-bodies", checked: shown });
	const status = h("p.muted", { role: "status" });
	const bar = h("progress", { hidden: true, "aria-label": t("export") });
	const actions = h("div.actions");
	const run = async (form) => {
		fill(actions, button(t("stop"), () => box.close()));
		bar.hidden = false;
		try {
			const { blob, events } = await collect(consultation, { ...query, bodies: bodies.checked ? 1 : 0 }, until, form, stop.signal, (events, size) => {
				status.textContent = t("exported", { n: count(events), size: bytes(size) });
			});
			save(blob, `${consultation}.${form}`);
			status.textContent = t("exportDone", { n: count(events), size: bytes(blob.size) });
			bar.hidden = true;
			fill(actions, button(t("close"), () => box.close(), { kind: "primary" }));
		} catch (problem) {
			if (problem.name === "AbortError") return;
			bar.hidden = true;
			fill(actions, problemBox(problem, () => run(form)));
		}
	};
	fill(actions, button("NDJSON", () => run("ndjson"), { glyph: "save", kind: "primary" }), button("CSV", () => run("csv"), { glyph: "save" }));
	box.append(h("p", {}, t("exportHint")), h("p.check", {}, bodies, h("label", { for: "export-bodies" }, t("withBodies"))), bar, status, actions);
}

async function collect(consultation, query, until, form, signal, onprogress) {
	// a Blob of Blobs may be kept on disk by the browser
	let blob = new Blob(form === "csv" ? [`${BYTE_ORDER_MARK}${COLUMNS.join(",")}\r\n`] : []);
	let events = 0;
	let path = `consultations/${consultation}/events`;
	let chosen = { ...query, limit: 1000 };
	while (path) {
		const response = await call(path, { query: chosen, headers: { Accept: "application/x-ndjson" }, signal });
		const page = await response.text().catch((error) => {
			throw error.name === "AbortError" ? error : new Problem(0, { title: t("unreachable"), detail: t("unreachableDetail") });
		});
		const lines = page.split("\n").filter((line) => line && !(until && parseRecord(line).received > until));
		blob = new Blob([blob, ...lines.map((line) => (form === "csv" ? csvLine(consultation, line) : `${line}\n`))]);
		events += lines.length;
		onprogress(events, blob.size);
		path = relative(/<([^>]*)>; rel="next"/.exec(response.headers.get("Link") ?? "")?.[1]);
		chosen = undefined;
	}
	return { blob: new Blob([blob], { type: form === "csv" ? "text/csv" : "application/x-ndjson" }), events };
}

export function save(blob, name) {
	const link = h("a", { href: URL.createObjectURL(blob), download: name });
	document.body.append(link);
	link.click();
	link.remove();
	setTimeout(() => URL.revokeObjectURL(link.href), 60_000);
}
