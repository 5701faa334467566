declare module 'virtual:outline' {
  export const coarse: string;
  export const fine: string;
}
