/** Dead letters: what could not be persisted, why, and what an operator does about it. */

import { json, relative, text, url } from "./api.js";
import { address } from "./app.js";
import { asCommands, button, bytes, commands, count, dialog, empty, field, fill, foreign, h, iconButton, linkButton, moment, problemBox, say, table } from "./dom.js";
import { indent, members } from "./json.js";
import { t } from "./texts.js";

const LIMIT = 100;

class Dead extends HTMLElement {
	connectedCallback() {
		this.gone = new AbortController();
		this.body = h("tbody");
		this.message = h("div.messages");
		this.more = h("div.more");
		this.side = h("div.side", { hidden: true });
		const columns = [["#"], [t("time"), "wide"], [t("consultation")], [t("reason")], [t("size"), "number wide"]];
		this.table = table(t("view-dead-letters"), columns, this.body);
		fill(this, h("div.page", {},
			h("div.bar.wrap", {}, h("h1", { tabindex: "-1" }, t("view-dead-letters")),
				h("div.actions", {}, button(t("commands"), () => commands(asCommands(url("dead-letters", { limit: LIMIT }).href)), { glyph: "code" }), linkButton())),
			this.message, h("div.split", {}, h("div.grow", {}, h("div.card.flush.scroll", {}, this.table), this.more), this.side)));
		window.addEventListener("fi-clock", () => this.draw(), { signal: this.gone.signal });
		this.addEventListener("keydown", (event) => event.key === "Escape" && this.close());
		this.load().then(() => this.rest[0] && this.open(Number(this.rest[0])));
	}

	disconnectedCallback() {
		this.gone.abort();
	}

	async load(path = "dead-letters", query = { limit: LIMIT }) {
		try {
			const page = await json(path, { query, signal: this.gone.signal });
			this.items = query ? page.dead_letters : [...this.items, ...page.dead_letters];
			this.next = page.next;
			fill(this.message);
			this.draw();
		} catch (problem) {
			if (problem.name !== "AbortError") fill(this.message, problemBox(problem, () => this.load(path, query)));
		}
	}

	draw() {
		if (!this.items) return;
		fill(this.body, this.items.map((item) => this.row(item)));
		this.table.hidden = !this.items.length;
		fill(this.more, this.items.length ? this.next && button(t("more"), () => this.load(relative(this.next), null)) : empty(t("noDead"), t("noDeadHint")));
	}

	row(item) {
		const listed = item.conflicts && h("span.tag", {}, t("conflictCount", { n: count(item.conflicts) }));
		return h("tr", { class: item.sequence === this.opened ? "selected" : "" },
			h("th", { scope: "row" }, h("a", { href: address(["dead-letters", String(item.sequence)]), onclick: (event) => (event.preventDefault(), this.open(item.sequence)) }, `#${item.sequence}`)),
			h("td.wide", {}, moment(item.time)),
			h("td", {}, foreign(h("code"), item.consultation_id ?? ""), listed),
			h("td", {}, foreign(h("span"), item.reason)),
			h("td.number.wide", {}, bytes(item.bytes)));
	}

	// -- one letter -----------------------------------------------------------------------------------------------------

	async open(sequence) {
		this.opened = sequence;
		history.replaceState(null, "", address(["dead-letters", String(sequence)]));
		this.draw();
		const item = this.items?.find((one) => one.sequence === sequence) ?? { sequence, reason: "", bytes: 0 };
		const body = h("div.body");
		const show = async () => {
			try {
				const answer = await text(`dead-letters/${sequence}`, { signal: this.gone.signal });
				const found = members(answer);
				const body_ = found.get("body") ?? found.get("body_base64");
				const shown = body_ === undefined ? indent(found.get("events")) : JSON.parse(body_);
				fill(body, foreign(h("pre.code.raw", { tabindex: "0", "aria-label": t("body") }), shown));
			} catch (problem) {
				if (problem.name !== "AbortError") fill(body, problemBox(problem, show));
			}
		};
		fill(body, h("div.masked", {}, h("p.muted", {}, t("bodyHidden", { size: bytes(item.bytes) })), button(t("showBody"), show, { glyph: "eye", kind: "primary" }), h("p.muted.small", {}, t("bodyAudited"))));
		const line = (name, value) => (value ?? "") !== "" && [h("dt", {}, name), foreign(h("dd"), String(value))];
		const panel = h("aside.panel", { "aria-label": t("view-dead-letters") },
			h("header.bar", {}, h("h2", { tabindex: "-1" }, `#${sequence}`), linkButton(), iconButton(t("close"), "close", () => this.close())),
			foreign(h("p"), item.reason),
			h("dl.details", {}, line(t("consultation"), item.consultation_id), line(t("messageId"), item.message_id), line(t("sequence"), item.stream_sequence), line(t("partition"), item.partition), line(t("traceId"), item.trace_id)),
			item.obstacle ? foreign(h("p.muted"), item.obstacle) : null,
			h("div.actions", {}, button(t("requeue"), () => this.ask(sequence, "requeue"), { disabled: Boolean(item.obstacle) }), button(t("drop"), () => this.ask(sequence, "drop"), { kind: "danger" })),
			body);
		this.side.hidden = false;
		fill(this.side, panel);
		panel.querySelector("h2").focus();
	}

	close() {
		if (this.side.hidden) return;
		this.side.hidden = true;
		this.opened = null;
		history.replaceState(null, "", "#/dead-letters");
		this.draw();
	}

	/** Ask for confirmation, and for the reason where the service wants one. */
	ask(sequence, action) {
		const reason = h("input", { type: "text", required: action === "drop", maxlength: 500, autocomplete: "off" });
		const message = h("div");
		const submit = async (event) => {
			event.preventDefault();
			try {
				const headers = { "Content-Type": "application/json" };
				await json(`dead-letters/${sequence}/${action}`, { method: "POST", body: JSON.stringify({ reason: reason.value }), headers });
				box.close();
				this.close();
				say(t(action === "drop" ? "dropped" : "requeued", { n: sequence }));
				this.load();
			} catch (problem) {
				fill(message, problemBox(problem));
			}
		};
		const box = dialog(t(`${action}Title`, { n: sequence }),
			h("form.card.stack", { onsubmit: submit }, h("p", {}, t(`${action}Hint`)), field(t("reason"), reason), message,
				h("div.bar", {}, h("button.button", { type: "submit", class: action === "drop" ? "danger" : "primary" }, t(action)), button(t("cancel"), () => box.close()))));
	}
}

customElements.define("fi-dead", Dead);
