/** The frame: navigation, the token, and the view that the address names. */

import { CONFIG, session, may, signIn, signOut } from "./api.js";
import "./consultations.js";
import { button, choice, clock, field, fill, h, icon, problemBox, stamp } from "./dom.js";
import { language, t } from "./texts.js";

/** Each view: the module that has it unless that is here already, its element, and the scope it needs. */
const VIEWS = {
	consultations: [null, "fi-consultations", "read"],
	consultation: ["./consultation.js", "fi-consultation", "read"],
	live: ["./live.js", "fi-live", "read"],
	pipeline: ["./pipeline.js", "fi-pipeline", "ops"],
	"dead-letters": ["./dead.js", "fi-dead", "ops"],
	post: ["./post.js", "fi-post", "write"],
};
const MENU = ["consultations", "live", "pipeline", "dead-letters", "post"];

const main = h("main", { id: "main", tabindex: "-1" });
const menu = h("nav.menu", { "aria-label": t("menu") });
const account = h("div.account");
let shown = null;

/** Return the first view that the token allows. */
const home = () => MENU.find((name) => may(VIEWS[name][2])) ?? MENU[0];

/** Return the view that the address names, its path's further parts, and its query. */
export function here() {
	const [path, query = ""] = location.hash.replace(/^#\/?/, "").split("?");
	const [name, ...rest] = path.split("/").map(decodeURIComponent);
	const view = name === "consultations" && rest[0] ? "consultation" : name || home();
	return { view, rest, query: new URLSearchParams(query) };
}

/** Return the address of a view. */
export function address(path, query = {}) {
	const kept = Object.entries(query).filter(([, value]) => value !== "" && value !== null && value !== undefined && value !== false);
	const text = new URLSearchParams(kept).toString();
	return `#/${path.map(encodeURIComponent).join("/")}${text ? `?${text}` : ""}`;
}

/** Change the query of the present view's address without drawing it anew: the address is its permanent link. */
export function remember(query) {
	const { view, rest } = here();
	const path = view === "consultation" ? ["consultations", rest[0]] : [view, ...rest];
	history.replaceState(null, "", address(path, query));
}

async function show() {
	const { view, rest, query } = here();
	for (const link of menu.children) {
		const current = link.dataset.view === (view === "consultation" ? "consultations" : view);
		link.toggleAttribute("data-current", current);
		if (current) link.setAttribute("aria-current", "page");
		else link.removeAttribute("aria-current");
	}
	shown?.remove();
	shown = null;
	if (session.required && !session.name) return showSignIn();
	const known = VIEWS[view];
	if (!known) return place(h("div.page", {}, title(t("unknownView")), h("p", {}, h("a", { href: "#/consultations" }, t("toConsultations")))));
	const [module, tag, scope] = known;
	if (!may(scope)) return place(h("div.page", {}, title(t(`view-${view}`)), h("div.notice", {}, t("needsScope", { scope }))));
	try {
		// an await, even of what is here, lets a frame pass before the view asks for its data
		if (module) await import(module);
	} catch (error) {
		return place(h("div.page", {}, title(t(`view-${view}`)), problemBox(error, show)));
	}
	const element = document.createElement(tag);
	element.rest = rest;
	element.query = query;
	return place(element);
}

function place(element) {
	shown = element;
	fill(main, element);
	const heading = main.querySelector("h1");
	document.title = heading ? `${heading.textContent} · fiq` : "fiq";
	// both lay the page out, so they come after the view's first request
	window.scrollTo(0, 0);
	menu.scrollLeft = (menu.querySelector("[data-current]")?.offsetLeft ?? 40) - 40;
}

const title = (text) => h("h1", { tabindex: "-1" }, text);

// -- token --

function showSignIn(reason = null) {
	const input = h("input", { type: "password", autocomplete: "off", spellcheck: "false", required: true, name: "token" });
	const message = h("div", {}, reason && problemBox(reason));
	const form = h(
		"form.signin.card",
		{
			onsubmit: async (event) => {
				event.preventDefault();
				try {
					await signIn(input.value.trim());
				} catch (problem) {
					fill(message, problemBox(problem));
					input.select();
				}
			},
		},
		h("h1", { tabindex: "-1" }, icon("key"), t("signIn")),
		h("p.muted", {}, t("signInHint")),
		field(t("token"), input),
		message,
		h("button.button.primary", { type: "submit" }, t("signInAction")),
		h("p.muted.small", {}, t("signInHow"), " ", h("code", {}, "fiq token new NAME --scopes read")),
	);
	place(h("div.page", {}, form));
	input.focus();
}

function drawAccount() {
	const found = [];
	if (session.name) {
		const until = session.expires ? ` · ${t("until", { time: stamp(session.expires).slice(0, 16) })}` : "";
		const scopes = session.scopes.map((scope) => t(`scope-${scope}`)).join(", ");
		found.push(h("span.who", { title: `${scopes}${until}${session.prefix ? ` · ${session.prefix}*` : ""}` }, h("b", {}, session.name), h("span.muted", {}, scopes)));
		found.push(button(t("signOut"), () => signOut(), { kind: "small" }));
	}
	fill(account, found);
}

function drawMenu() {
	const allowed = MENU.filter((name) => !session.name || may(VIEWS[name][2]));
	fill(menu, allowed.map((name) => h("a", { href: `#/${name}`, "data-view": name }, t(`view-${name}`))));
}

// -- start --

function setClock(utc) {
	clock.utc = utc;
	window.dispatchEvent(new Event("fi-clock"));
}

function start() {
	document.documentElement.lang = language;
	const skip = h("a.skip", { href: "#main", onclick: (event) => (event.preventDefault(), main.focus()) }, t("skip"));
	const zone = choice(t("timeZone"), [["local", t("local")], ["utc", "UTC"]], "local", (value) => setClock(value === "utc"));
	const brand = h("a.brand", { href: "#/" }, h("img", { src: "ui/icon.svg", alt: "", width: 22, height: 22 }), "fiq");
	brand.title = `fiq ${CONFIG.version}`;
	const header = h("header.top", {}, brand, menu, h("div.end", {}, zone, account));
	const announcer = h("div", { id: "announcer", role: "status", "aria-live": "polite" });
	document.body.append(skip, header, main, announcer);
	drawMenu();
	window.addEventListener("hashchange", show);
	window.addEventListener("fi-session", () => {
		drawAccount();
		drawMenu();
		show();
	});
	window.addEventListener("fi-unauthorized", (event) => {
		Object.assign(session, { required: true, name: "", scopes: [] });
		drawAccount();
		shown?.remove();
		showSignIn(event.detail);
	});
	show();
}

start();
