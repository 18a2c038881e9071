/**
 * A list of any length, of which only what is in view has elements.
 *
 * Rows have any height: they are measured when they appear, and estimated before. What is in view stays where it is when
 * rows above it are added or measured.
 */

import { h } from "./dom.js";

const OVERSCAN = 600;

export class VirtualList {
	/**
   * `render(item, index)` makes the element of an item, `key(item)` tells items apart; `onscroll(first, last)` is called
   * with the indices that are in view.
   */
	constructor({ label, render, key, onscroll, estimate = 46 }) {
		Object.assign(this, { render, key, onscroll, estimate });
		this.items = [];
		this.heights = [];
		this.offsets = new Float64Array(1);
		this.valid = 0;
		this.shown = new Map();
		this.body = h("div.rows", { role: "feed", "aria-label": label });
		this.element = h("div.scroller", { tabindex: "-1" }, this.body);
		this.element.addEventListener("scroll", () => this.schedule(), { passive: true });
		this.body.addEventListener("keydown", (event) => this.keydown(event));
		this.observer = new ResizeObserver(() => {
			if (this.width !== this.element.clientWidth) this.forget();
			this.schedule();
		});
		this.observer.observe(this.element);
	}

	/** Replace all items; the list begins at the top. */
	reset(items = []) {
		for (const element of this.shown.values()) element.remove();
		this.shown.clear();
		this.items = items;
		this.heights = items.map(() => this.estimate);
		this.valid = 0;
		this.element.scrollTop = 0;
		this.update();
	}

	/** Add items; with `follow` a list that is at its end stays there. */
	append(items, follow = false) {
		const stick = follow && this.atEnd;
		this.items.push(...items);
		for (let left = items.length; left > 0; left -= 1) this.heights.push(this.estimate);
		this.update();
		if (stick) this.toEnd();
	}

	prepend(items) {
		this.items.unshift(...items);
		this.heights.unshift(...items.map(() => this.estimate));
		this.valid = 0;
		this.layout();
		this.element.scrollTop += this.offsets[items.length];
		this.update();
	}

	/** Make the element of an item anew. */
	refresh(item) {
		const key = this.key(item);
		const old = this.shown.get(key);
		if (!old) return;
		const index = Number(old.dataset.index);
		const focused = old.contains(document.activeElement);
		const fresh = this.make(item, index);
		old.replaceWith(fresh);
		this.shown.set(key, fresh);
		if (focused) fresh.focus({ preventScroll: true });
		this.schedule();
	}

	/** Make all elements anew. */
	redraw() {
		for (const element of this.shown.values()) element.remove();
		this.shown.clear();
		this.forget();
		this.update();
	}

	forget() {
		this.width = this.element.clientWidth;
		this.remeasure = true;
	}

	get atEnd() {
		return this.element.scrollTop + this.element.clientHeight >= this.element.scrollHeight - 40;
	}

	toEnd() {
		for (let turn = 0; turn < 4; turn += 1) {
			const { scrollTop, scrollHeight, clientHeight } = this.element;
			if (turn && scrollTop + clientHeight >= scrollHeight - 1) return;
			this.element.scrollTop = scrollHeight;
			this.draw();
		}
	}

	/** Bring the item at `index` into view, and focus it. */
	show(index, focus = true) {
		for (let turn = 0; turn < 4; turn += 1) {
			this.layout();
			this.element.scrollTop = Math.max(0, this.offsets[index] - this.element.clientHeight / 3);
			this.draw();
		}
		if (focus) this.shown.get(this.key(this.items[index]))?.focus({ preventScroll: true });
	}

	// -- drawing --------------------------------------------------------------------------------------------------------

	schedule() {
		this.frame ??= requestAnimationFrame(() => {
			this.frame = null;
			this.draw();
		});
	}

	update() {
		this.layout();
		this.draw();
	}

	/** Make the offsets valid. */
	layout() {
		if (this.offsets.length < this.items.length + 1) {
			const larger = new Float64Array((this.items.length + 1) * 2);
			larger.set(this.offsets);
			this.offsets = larger;
		}
		for (let index = this.valid; index < this.items.length; index += 1) {
			this.offsets[index + 1] = this.offsets[index] + this.heights[index];
		}
		this.valid = this.items.length;
		const height = `${this.offsets[this.items.length]}px`;
		if (this.body.style.height !== height) this.body.style.height = height;
	}

	/** Return the index of the item at a height. */
	at(offset) {
		let low = 0;
		let high = this.items.length;
		while (low < high) {
			const middle = (low + high) >> 1;
			if (this.offsets[middle + 1] <= offset) low = middle + 1;
			else high = middle;
		}
		return Math.min(low, Math.max(0, this.items.length - 1));
	}

	draw() {
		if (!this.element.isConnected) return;
		const top = this.element.scrollTop;
		const height = this.element.clientHeight;
		const anchor = this.at(top);
		const within = top - this.offsets[anchor];
		const first = this.at(top - OVERSCAN);
		const last = this.items.length ? this.at(top + height + OVERSCAN) : -1;
		const wanted = new Map();
		for (let index = first; index <= last; index += 1) wanted.set(this.key(this.items[index]), index);
		for (const [key, element] of this.shown) {
			if (!wanted.has(key) && !element.contains(document.activeElement)) {
				element.remove();
				this.shown.delete(key);
			}
		}
		const fresh = document.createDocumentFragment();
		for (const [key, index] of wanted) {
			const known = this.shown.get(key);
			if (known) {
				known.dataset.index = index;
				continue;
			}
			const element = this.make(this.items[index], index);
			this.shown.set(key, element);
			fresh.append(element);
		}
		this.body.append(fresh);
		this.measure(anchor, within);
		if (this.items.length) this.onscroll?.(this.at(this.element.scrollTop), this.at(this.element.scrollTop + height));
	}

	make(item, index) {
		const element = this.render(item, index);
		element.classList.add("row");
		element.dataset.index = index;
		element.setAttribute("aria-posinset", index + 1);
		element.setAttribute("aria-setsize", "-1");
		if (!element.hasAttribute("tabindex")) element.setAttribute("tabindex", "0");
		return element;
	}

	/** Measure what is shown, and place it; the item `anchor` stays in its place. */
	measure(anchor, within) {
		let changed = this.items.length;
		for (const element of this.shown.values()) {
			const index = Number(element.dataset.index);
			const height = element.offsetHeight;
			if (height && Math.abs(this.heights[index] - height) > 0.5) {
				this.heights[index] = height;
				changed = Math.min(changed, index);
			}
		}
		if (changed < this.items.length) {
			this.valid = changed;
			this.layout();
			const top = this.offsets[anchor] + within;
			if (changed < anchor && Math.abs(this.element.scrollTop - top) > 1) this.element.scrollTop = top;
			this.schedule();
		}
		for (const element of this.shown.values()) {
			const place = `translateY(${this.offsets[Number(element.dataset.index)]}px)`;
			if (element.style.transform !== place) element.style.transform = place;
		}
	}

	// -- keys -----------------------------------------------------------------------------------------------------------

	keydown(event) {
		const row = event.target.closest(".row");
		if (!row || event.altKey || event.ctrlKey || event.metaKey) return;
		const index = Number(row.dataset.index);
		const page = Math.max(1, Math.floor(this.element.clientHeight / this.estimate) - 1);
		const steps = { ArrowDown: 1, ArrowUp: -1, PageDown: page, PageUp: -page };
		let next = index + (steps[event.key] ?? 0);
		if (event.key === "Home") next = 0;
		else if (event.key === "End") next = this.items.length - 1;
		else if (!steps[event.key]) return;
		event.preventDefault();
		this.show(Math.min(this.items.length - 1, Math.max(0, next)));
	}

	close() {
		this.observer.disconnect();
	}
}
