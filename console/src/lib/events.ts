// Events in words.
import type { Event } from './api';

const str = (event: Event, ...names: string[]): string => {
  for (const name of names) {
    const value = event.params?.[name];
    if (value !== undefined && value !== null && value !== '') return String(value);
  }
  return '';
};

/** What happened; `brief` leaves addresses out. */
export function describe(event: Event, brief = false): string {
  switch (event.kind) {
    case 'online': return `came online${str(event, 'peer') && !brief ? ` from ${str(event, 'peer')}` : ''}`;
    case 'offline': {
      const reason = str(event, 'close.name', 'reason').replaceAll('_', ' ');
      return `went offline${reason ? `: ${reason}` : ''}`;
    }
    case 'registered': return `registered by its first login${str(event, 'ident') && !brief ? ` as ${str(event, 'ident')}` : ''}`;
    case 'rejected': {
      const reason = str(event, 'close.name', 'error.class', 'reason').replaceAll('_', ' ');
      const from = str(event, 'ident', 'peer');
      return `Connection${from ? ` of ${from}` : ''} refused${reason ? `: ${reason}` : ''}`;
    }
    case 'command': return `command “${str(event, 'name', 'command.name')}” ${str(event, 'status', 'command.status')}`;
    case 'audit': return `${str(event, 'kind', 'object.kind') || 'object'} ${str(event, 'action')}d by ${str(event, 'actor', 'actor.name') || 'someone'}`;
  }
}

export function toneOf(event: Event): 'ok' | 'warn' | 'bad' | 'ring' | '' {
  switch (event.kind) {
    case 'online': case 'registered': return 'ok';
    case 'offline': return 'ring';
    case 'rejected': return 'bad';
    case 'command': return ['failed', 'expired'].includes(str(event, 'status', 'command.status')) ? 'warn' : '';
    case 'audit': return '';
  }
}
