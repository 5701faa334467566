// Frames to try in the playground, made up for the console.
import type { Transport } from './api';

export interface Sample {
  title: string;
  input: string;
  identified: boolean;
  transport: Transport;
}

/** CRC-16/IBM (ARC), as Teltonika and Wialon IPS 2.0 use it. */
export function crc16(bytes: Uint8Array): number {
  let crc = 0;
  for (const byte of bytes) {
    crc ^= byte;
    for (let i = 0; i < 8; i++) crc = crc & 1 ? (crc >>> 1) ^ 0xa001 : crc >>> 1;
  }
  return crc;
}

const hex = (n: number, bytes: number): string => (n < 0 ? n + 2 ** (8 * bytes) : n).toString(16).padStart(2 * bytes, '0');

/** A Teltonika codec 8 packet with one record. */
export function teltonikaFrame(time_ms: number, latitude: number, longitude: number, speed_kmh: number, direction: number): string {
  const record =
    time_ms.toString(16).padStart(16, '0') + hex(0, 1) + hex(Math.round(longitude * 1e7), 4) + hex(Math.round(latitude * 1e7), 4) + hex(120, 2) +
    hex(direction, 2) + hex(11, 1) + hex(speed_kmh, 2) +
    // Event 0; 4 elements: ignition 239 and movement 240 in one byte, external voltage 66 and battery voltage 67 in two.
    `000402ef01f0010242${hex(12_480, 2)}43${hex(4_051, 2)}0000`;
  const data = `0801${record}01`;
  const bytes = Uint8Array.from(data.match(/../g) ?? [], (b) => Number.parseInt(b, 16));
  return `00000000${hex(bytes.length, 4)}${data}${hex(crc16(bytes), 4)}`;
}

export function samples(protocol: string): Sample[] {
  if (protocol.includes('teltonika')) {
    return [
      { title: 'Example: one record', input: teltonikaFrame(Date.UTC(2026, 5, 1, 9, 30), 52.5163, 13.3777, 42, 270), identified: true, transport: 'tcp' },
      { title: 'Example: login', input: '000f333536333037303432343431303133', identified: false, transport: 'tcp' },
    ];
  }
  if (protocol.includes('wialon')) {
    return [
      { title: 'Example: position', input: '#SD#010626;093000;5230.9780;N;01322.6620;E;42;270;35;11\r\n', identified: true, transport: 'tcp' },
      { title: 'Example: data', input: '#D#010626;093000;5230.9780;N;01322.6620;E;42;270;35;11;0.9;1;0;12.48,4.05;NA;temp:2:21.5,ign:1:1\r\n', identified: true, transport: 'tcp' },
      { title: 'Example: login', input: '#L#demo-0001;NA\r\n', identified: false, transport: 'tcp' },
    ];
  }
  return [];
}
