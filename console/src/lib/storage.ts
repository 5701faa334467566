// Sizes as people type them: a number and a decimal unit.
const FACTORS = { MB: 1e6, GB: 1e9, TB: 1e12 } as const;
export type StorageUnit = keyof typeof FACTORS;
export const UNITS = Object.keys(FACTORS) as StorageUnit[];

export function bytesOf(amount: number, unit: StorageUnit): number {
  return Math.max(0, Math.min(Number.MAX_SAFE_INTEGER, Math.round(amount * FACTORS[unit])));
}

/** The amount in `unit`; without one in the largest that does not make it less than one. GB for none. */
export function unitsOf(bytes: number, unit?: StorageUnit): { amount: number; unit: StorageUnit } {
  const chosen = unit ?? (bytes === 0 ? 'GB' : bytes >= FACTORS.TB ? 'TB' : bytes >= FACTORS.GB ? 'GB' : 'MB');
  return { amount: bytes / FACTORS[chosen], unit: chosen };
}
