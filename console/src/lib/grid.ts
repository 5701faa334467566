// A table of any length: rows in view are kept in the page and reused while scrolling, cells are written only when their
// text changes. Plain DOM, since at 10,000 live rows every microsecond per cell counts.
import { HEIGHT_MAX, reveal, visible } from './virtual';

export interface Column<T> {
  key: string;
  title: string;
  /** Any CSS grid track, such as `120px` or `minmax(160px, 2fr)`. */
  width: string;
  numeric?: boolean;
  mono?: boolean;
  sortable?: boolean;
  hint?: string;
  text(row: T): string;
  /** Extra class of the cell, such as a dot's colour. */
  look?(row: T): string;
  /** Address that the cell links to. */
  link?(row: T): string;
}

export interface GridOptions<T> {
  label: string;
  rowHeight: number;
  idOf(row: T): string;
  onSort?(key: string): void;
  onSelect?(row: T | null, index: number): void;
  onOpen?(row: T): void;
}

interface Slot {
  el: HTMLElement;
  cells: HTMLElement[];
  texts: string[];
  looks: string[];
  index: number;
}

const HEAD_PX = 34;
const OVERSCAN = 8;

export class Grid<T> {
  private columns: Column<T>[] = [];
  private count = 0;
  private rowAt: (index: number) => T | undefined = () => undefined;
  private readonly head = document.createElement('div');
  private readonly body = document.createElement('div');
  private slots: Slot[] = [];
  private frame = 0;
  private full = true;
  private selectedId = '';
  private selectedIndex = -1;
  private height = 0;
  private readonly observer: ResizeObserver;
  private sort = { key: '', descending: false };
  lastScroll = 0;

  constructor(
    private readonly host: HTMLElement,
    private readonly options: GridOptions<T>,
  ) {
    host.classList.add('grid');
    host.setAttribute('role', 'grid');
    host.setAttribute('aria-label', options.label);
    host.tabIndex = 0;
    this.head.className = 'grid-head';
    this.head.setAttribute('role', 'row');
    this.body.className = 'grid-body';
    this.body.setAttribute('role', 'rowgroup');
    host.append(this.head, this.body);
    host.addEventListener('scroll', this.onScroll, { passive: true });
    host.addEventListener('keydown', this.onKey);
    this.body.addEventListener('click', this.onClick);
    this.body.addEventListener('dblclick', this.onDouble);
    this.observer = new ResizeObserver(() => {
      this.height = host.clientHeight - HEAD_PX;
      this.plan();
    });
    this.observer.observe(host);
  }

  destroy(): void {
    cancelAnimationFrame(this.frame);
    this.observer.disconnect();
    this.host.removeEventListener('scroll', this.onScroll);
    this.host.removeEventListener('keydown', this.onKey);
    this.head.remove();
    this.body.remove();
  }

  setColumns(columns: Column<T>[]): void {
    this.columns = columns;
    this.host.style.setProperty('--grid-columns', columns.map((c) => c.width).join(' '));
    // Header and rows share tracks only if they share a width: the sum of the least widths, or the whole table's.
    const least = columns.reduce((sum, c) => sum + Number(/\d+/.exec(c.width)?.[0] ?? 0), 0);
    this.host.style.setProperty('--grid-least', `${least}px`);
    this.host.setAttribute('aria-colcount', String(columns.length));
    this.head.replaceChildren(
      ...columns.map((column) => {
        const cell = document.createElement('div');
        cell.setAttribute('role', 'columnheader');
        cell.className = column.numeric ? 'num' : '';
        if (column.hint) cell.title = column.hint;
        if (column.sortable && this.options.onSort) {
          const button = document.createElement('button');
          button.type = 'button';
          button.textContent = column.title;
          button.addEventListener('click', () => this.options.onSort?.(column.key));
          cell.append(button);
        } else {
          cell.textContent = column.title;
        }
        cell.dataset['key'] = column.key;
        return cell;
      }),
    );
    this.body.replaceChildren();
    this.slots = [];
    this.showSort();
    this.plan(true);
  }

  setSort(key: string, descending: boolean): void {
    this.sort = { key, descending };
    this.showSort();
  }

  private showSort(): void {
    for (const cell of this.head.children) {
      const mine = (cell as HTMLElement).dataset['key'] === this.sort.key;
      if (mine) cell.setAttribute('aria-sort', this.sort.descending ? 'descending' : 'ascending');
      else cell.removeAttribute('aria-sort');
    }
  }

  /** Other rows, or another order. */
  setRows(count: number, rowAt: (index: number) => T | undefined): void {
    this.count = count;
    this.rowAt = rowAt;
    this.host.setAttribute('aria-rowcount', String(count + 1));
    this.body.style.height = `${Math.min(HEIGHT_MAX, count * this.options.rowHeight)}px`;
    this.plan(true);
  }

  /** The content of visible rows may have changed. */
  refresh(): void {
    this.plan(true);
  }

  select(id: string, index: number, show: boolean): void {
    this.selectedId = id;
    this.selectedIndex = index;
    if (show && index >= 0) {
      this.host.scrollTop = reveal(index, this.host.scrollTop, this.height, this.options.rowHeight);
    }
    this.plan(true);
  }

  private plan(full = false): void {
    this.full ||= full;
    if (this.frame) return;
    this.frame = requestAnimationFrame(() => {
      this.frame = 0;
      this.render();
    });
  }

  private readonly onScroll = (): void => {
    this.lastScroll = performance.now();
    this.plan();
  };

  private slot(): Slot {
    const el = document.createElement('div');
    el.className = 'grid-row';
    el.setAttribute('role', 'row');
    // Until it shows a row: it would lie over the first one.
    el.hidden = true;
    const cells = this.columns.map((column) => {
      const cell = document.createElement(column.link ? 'a' : 'div');
      cell.setAttribute('role', 'gridcell');
      const classes = [column.numeric ? 'num' : '', column.mono ? 'mono' : ''].filter(Boolean).join(' ');
      if (classes) cell.className = classes;
      if (column.link) cell.tabIndex = -1;
      el.append(cell);
      return cell;
    });
    this.body.append(el);
    return { el, cells, texts: cells.map(() => ''), looks: cells.map(() => ''), index: -1 };
  }

  private render(): void {
    const { rowHeight } = this.options;
    const { full } = this;
    this.full = false;
    if (this.columns.length === 0) return;
    const range = visible(this.host.scrollTop, this.height, rowHeight, this.count, OVERSCAN);
    const needed = Math.ceil(Math.max(1, this.height) / rowHeight) + 2 * OVERSCAN + 2;
    while (this.slots.length < needed) this.slots.push(this.slot());
    if (this.slots.length > needed * 2) {
      for (const gone of this.slots.splice(needed)) gone.el.remove();
      for (const slot of this.slots) slot.index = -1;
    }
    const size = this.slots.length;
    for (let index = range.first; index < range.end; index++) {
      const slot = this.slots[index % size]!;
      const moved = slot.index !== index;
      if (moved) {
        slot.index = index;
        slot.el.style.transform = `translateY(${index * rowHeight}px)`;
        slot.el.setAttribute('aria-rowindex', String(index + 2));
        slot.el.hidden = false;
      }
      if (moved || full) this.fill(slot, index);
    }
    for (const slot of this.slots) {
      if (slot.index >= 0 && (slot.index < range.first || slot.index >= range.end)) {
        slot.index = -1;
        slot.el.hidden = true;
      }
    }
    const chosen = this.selectedIndex >= range.first && this.selectedIndex < range.end;
    if (chosen) this.host.setAttribute('aria-activedescendant', this.slots[this.selectedIndex % size]!.el.id);
    else this.host.removeAttribute('aria-activedescendant');
  }

  private fill(slot: Slot, index: number): void {
    const row = this.rowAt(index);
    if (row === undefined) {
      slot.el.hidden = true;
      slot.index = -1;
      return;
    }
    const id = this.options.idOf(row);
    if (slot.el.dataset['id'] !== id) {
      slot.el.dataset['id'] = id;
      slot.el.id = `row-${id}`;
      this.columns.forEach((column, at) => {
        if (column.link) (slot.cells[at] as HTMLAnchorElement).href = column.link(row);
      });
    }
    const selected = id === this.selectedId;
    if (selected !== (slot.el.ariaSelected === 'true')) slot.el.ariaSelected = String(selected);
    for (let at = 0; at < this.columns.length; at++) {
      const column = this.columns[at]!;
      const text = column.text(row);
      if (text !== slot.texts[at]) {
        slot.texts[at] = text;
        const cell = slot.cells[at]!;
        // Replacing the data of a text node spares the page a new node.
        if (cell.firstChild) (cell.firstChild as Text).data = text;
        else cell.append(text);
      }
      if (column.look) {
        const look = column.look(row);
        if (look !== slot.looks[at]) {
          slot.looks[at] = look;
          slot.cells[at]!.dataset['look'] = look;
        }
      }
    }
  }

  private readonly onKey = (event: KeyboardEvent): void => {
    if (event.ctrlKey || event.metaKey || event.altKey || event.target !== this.host) return;
    const page = Math.max(1, Math.floor(this.height / this.options.rowHeight) - 1);
    const from = this.selectedIndex;
    const to: Record<string, number> = {
      ArrowDown: from + 1,
      ArrowUp: from < 0 ? 0 : from - 1,
      PageDown: from + page,
      PageUp: from - page,
      Home: 0,
      End: this.count - 1,
    };
    if (event.key === 'Enter') {
      const row = from >= 0 ? this.rowAt(from) : undefined;
      if (row !== undefined) this.options.onOpen?.(row);
      return;
    }
    const wanted = to[event.key];
    if (wanted === undefined || this.count === 0) return;
    event.preventDefault();
    this.choose(Math.max(0, Math.min(this.count - 1, wanted)), true);
  };

  private choose(index: number, show: boolean): void {
    const row = this.rowAt(index);
    if (row === undefined) return;
    this.select(this.options.idOf(row), index, show);
    this.options.onSelect?.(row, index);
  }

  private indexOf(event: Event): number {
    const el = (event.target as HTMLElement).closest<HTMLElement>('.grid-row');
    return this.slots.find((slot) => slot.el === el)?.index ?? -1;
  }

  private readonly onClick = (event: Event): void => {
    const index = this.indexOf(event);
    if (index >= 0) this.choose(index, false);
  };

  private readonly onDouble = (event: Event): void => {
    const row = this.rowAt(this.indexOf(event));
    if (row !== undefined) this.options.onOpen?.(row);
  };
}
