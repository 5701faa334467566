// Log lines of devices and channels, in words.
import type { Json, LogLine } from './api';

export type LogKind =
  | 'connected' | 'login' | 'frame' | 'reply' | 'command' | 'answer' | 'error' | 'closed' | 'refused' | 'compile' | 'started' | 'stopped';

export const kindOf = (line: LogLine): LogKind => String(line['log.kind'] ?? 'frame') as LogKind;
export const text = (line: LogLine, name: string): string => {
  const value = line[name];
  return value === undefined || value === null ? '' : String(value);
};

/** The messages of a frame's line; the server stores them as an array, or as the text of one. */
export function messagesOf(line: LogLine): Record<string, Json>[] {
  let messages: Json | undefined = line['messages'];
  if (typeof messages === 'string') {
    try {
      messages = JSON.parse(messages) as Json;
    } catch {
      return [];
    }
  }
  return Array.isArray(messages) ? (messages as Record<string, Json>[]) : [];
}

/** One line about a log line. */
export function summary(line: LogLine): string {
  const hex = text(line, 'frame.hex');
  // A frame that holds a password is not kept, only how long it was.
  const masked = line['frame.masked'] === true;
  const bytes = masked ? `${Number(line['frame.size'])} bytes, kept from the log for the password in them` : `${hex.length / 2} bytes`;
  switch (kindOf(line)) {
    case 'connected': return `Connected from ${text(line, 'peer') || 'somewhere'}`;
    case 'login': return `Identified as ${text(line, 'ident')}`;
    case 'frame': {
      const count = messagesOf(line).length;
      return `${bytes}, ${count === 1 ? '1 message' : `${count} messages`}`;
    }
    case 'reply': return hex ? `Replied ${bytes}` : text(line, 'text') || 'Replied';
    case 'command': return `Command sent: ${text(line, 'text') || bytes}`;
    case 'answer': return `Answered: ${text(line, 'text')}`;
    case 'error': return [text(line, 'error.class'), text(line, 'error.text')].filter(Boolean).join(': ') || text(line, 'text') || 'Error';
    case 'closed': return `Closed: ${text(line, 'close.name').replaceAll('_', ' ') || text(line, 'text') || 'no reason given'}`;
    case 'refused': return `Refused${text(line, 'ident') ? ` ${text(line, 'ident')}` : ''}: ${text(line, 'close.name').replaceAll('_', ' ') || text(line, 'error.text') || text(line, 'text')}`;
    case 'started': return `Listening${text(line, 'text') ? ` on ${text(line, 'text')}` : ''}`;
    case 'stopped': return `Stopped listening${text(line, 'text') ? `: ${text(line, 'text')}` : ''}`;
    case 'compile': return text(line, 'error.text') || text(line, 'text') || 'Protocol compiled';
    default: return text(line, 'text');
  }
}

export function tone(line: LogLine): 'ok' | 'warn' | 'bad' | 'accent' | '' {
  switch (kindOf(line)) {
    case 'error': case 'refused': return 'bad';
    case 'closed': {
      const name = text(line, 'close.name');
      return name === 'device_closed' || name === 'shutdown' || name === 'replaced' || name === '' ? '' : 'warn';
    }
    case 'connected': case 'login': case 'started': return 'ok';
    case 'command': case 'answer': return 'accent';
    default: return '';
  }
}

/** What someone can do about a connection that was refused or broke, by the reason's name. */
export function hint(line: LogLine): string {
  const reason = text(line, 'close.name') || text(line, 'error.class');
  switch (reason) {
    case 'unknown_device':
      return 'This channel takes only registered devices. Create a device with this ident, or let the channel register devices by itself.';
    case 'device_disabled': return 'The device is switched off in its settings. Enable it there.';
    case 'wrong_protocol': return 'What came is not this protocol: check that the device is set to it, and to this port.';
    case 'login_timeout': return 'Something connected but never said who it is. Check the device’s protocol setting; a port check alone does this too.';
    case 'bad_crc': return 'The checksum is wrong: bytes were changed on the way, or the test command lost characters when it was copied.';
    case 'protocol_error': case 'unsupported': case 'truncated': case 'bad_length':
      return 'The bytes do not fit the protocol. Paste them into the protocol’s playground to see where they break.';
    case 'frame_too_large': return 'A frame is larger than the channel allows. Raise the limit in the channel’s settings if the device really sends that much.';
    case 'too_many_connections': return 'The channel is full. Raise its connection limit.';
    case 'rate_limited': return 'More bytes came than the channel’s rate limit allows.';
    case 'registration_limited': return 'Too many devices registered themselves within a minute. It may try again; the limits are in the server’s configuration (gateway).';
    case 'tls_failed': return 'The TLS handshake failed: check the certificate, and that the device speaks TLS.';
    case 'storage_unavailable': return 'Messages could not be stored, so nothing was acknowledged. Check disk space under Settings › System.';
    default: return '';
  }
}
