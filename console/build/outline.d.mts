import type { Plugin } from 'vite';

export function outline(): Plugin;
