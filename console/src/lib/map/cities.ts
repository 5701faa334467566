// Cities, so that the outline map can be read without tiles: name, degrees north and east, zoom from which it shows.
import { xOf, yOf } from './mercator';
import type { Name } from './outline';

const ROWS = `
London 51.51 -0.13 4|Paris 48.86 2.35 4|Berlin 52.52 13.40 4|Madrid 40.42 -3.70 4|Rome 41.90 12.50 4|Moscow 55.76 37.62 4|Istanbul 41.01 28.98 4
Cairo 30.04 31.24 4|Lagos 6.52 3.38 4|Nairobi -1.29 36.82 4|Johannesburg -26.20 28.05 4|Casablanca 33.57 -7.59 5|Algiers 36.75 3.06 5|Tunis 36.81 10.18 5
Accra 5.60 -0.19 5|Dakar 14.72 -17.47 5|Kinshasa -4.44 15.27 5|Addis Ababa 9.03 38.74 5|Khartoum 15.50 32.56 5|Luanda -8.84 13.23 5|Cape Town -33.92 18.42 4
Dar es Salaam -6.79 39.21 5|Kampala 0.35 32.58 6|Abidjan 5.36 -4.01 5|Antananarivo -18.88 47.51 5|Maputo -25.97 32.57 6|Harare -17.83 31.05 6
New York 40.71 -74.01 4|Los Angeles 34.05 -118.24 4|Chicago 41.88 -87.63 4|Houston 29.76 -95.37 5|Miami 25.76 -80.19 5|Toronto 43.65 -79.38 5|Montreal 45.50 -73.57 6
Vancouver 49.28 -123.12 5|Seattle 47.61 -122.33 6|San Francisco 37.77 -122.42 5|Denver 39.74 -104.99 5|Dallas 32.78 -96.80 5|Atlanta 33.75 -84.39 5|Boston 42.36 -71.06 6
Washington 38.91 -77.04 5|Mexico City 19.43 -99.13 4|Guadalajara 20.66 -103.35 6|Monterrey 25.69 -100.32 6|Havana 23.11 -82.37 5|Panama City 8.98 -79.52 5
Bogotá 4.71 -74.07 4|Caracas 10.48 -66.90 5|Quito -0.18 -78.47 5|Lima -12.05 -77.04 4|La Paz -16.49 -68.12 5|Santiago -33.45 -70.67 4|Buenos Aires -34.60 -58.38 4
Montevideo -34.90 -56.16 6|São Paulo -23.55 -46.63 4|Rio de Janeiro -22.91 -43.17 5|Brasília -15.79 -47.88 5|Recife -8.05 -34.88 5|Manaus -3.12 -60.02 5|Asunción -25.26 -57.58 6
Tokyo 35.68 139.69 4|Osaka 34.69 135.50 6|Seoul 37.57 126.98 4|Beijing 39.90 116.41 4|Shanghai 31.23 121.47 4|Guangzhou 23.13 113.26 5|Hong Kong 22.32 114.17 5
Chengdu 30.57 104.07 5|Wuhan 30.59 114.31 5|Xi'an 34.34 108.94 6|Taipei 25.03 121.57 5|Manila 14.60 120.98 4|Jakarta -6.21 106.85 4|Singapore 1.35 103.82 4
Kuala Lumpur 3.14 101.69 6|Bangkok 13.76 100.50 4|Hanoi 21.03 105.85 5|Ho Chi Minh City 10.82 106.63 5|Yangon 16.87 96.20 5|Dhaka 23.81 90.41 5|Kolkata 22.57 88.36 5
Delhi 28.61 77.21 4|Mumbai 19.08 72.88 4|Bengaluru 12.97 77.59 5|Chennai 13.08 80.27 5|Karachi 24.86 67.01 4|Lahore 31.55 74.34 6|Colombo 6.93 79.86 6|Kathmandu 27.72 85.32 6
Kabul 34.56 69.21 5|Tashkent 41.30 69.24 5|Almaty 43.24 76.89 5|Tehran 35.69 51.39 4|Baghdad 33.31 44.37 5|Riyadh 24.71 46.68 4|Jeddah 21.49 39.19 6|Dubai 25.20 55.27 5
Doha 25.29 51.53 6|Kuwait City 29.38 47.99 6|Muscat 23.59 58.41 6|Tel Aviv 32.09 34.78 6|Amman 31.95 35.93 6|Beirut 33.89 35.50 6|Ankara 39.93 32.86 5|Tbilisi 41.72 44.83 6
Baku 40.41 49.87 6|Yerevan 40.18 44.51 6|Ulaanbaatar 47.89 106.91 5|Sydney -33.87 151.21 4|Melbourne -37.81 144.96 5|Brisbane -27.47 153.03 5|Perth -31.95 115.86 4
Adelaide -34.93 138.60 5|Auckland -36.85 174.76 4|Wellington -41.29 174.78 6|Port Moresby -9.44 147.18 5|Dublin 53.35 -6.26 5|Edinburgh 55.95 -3.19 6|Manchester 53.48 -2.24 6
Birmingham 52.49 -1.89 7|Glasgow 55.86 -4.25 7|Leeds 53.80 -1.55 7|Bristol 51.45 -2.59 7|Lisbon 38.72 -9.14 5|Porto 41.16 -8.63 6|Barcelona 41.39 2.17 5|Valencia 39.47 -0.38 6
Seville 37.39 -5.98 6|Bilbao 43.26 -2.93 7|Zaragoza 41.65 -0.89 7|Lyon 45.76 4.84 6|Marseille 43.30 5.37 6|Toulouse 43.60 1.44 6|Bordeaux 44.84 -0.58 6|Nantes 47.22 -1.55 7
Lille 50.63 3.06 7|Strasbourg 48.57 7.75 7|Nice 43.70 7.27 7|Brussels 50.85 4.35 5|Antwerp 51.22 4.40 7|Amsterdam 52.37 4.90 5|Rotterdam 51.92 4.48 7|Luxembourg 49.61 6.13 7
Hamburg 53.55 9.99 5|Munich 48.14 11.58 5|Cologne 50.94 6.96 6|Frankfurt 50.11 8.68 5|Stuttgart 48.78 9.18 6|Leipzig 51.34 12.37 6|Dresden 51.05 13.74 7|Hanover 52.38 9.73 6
Bremen 53.08 8.80 7|Nuremberg 49.45 11.08 7|Dortmund 51.51 7.47 7|Kassel 51.31 9.49 8|Erfurt 50.98 11.03 8|Würzburg 49.79 9.95 8|Freiburg 48.00 7.84 8|Rostock 54.09 12.14 7
Kiel 54.32 10.14 8|Magdeburg 52.12 11.63 8|Potsdam 52.40 13.06 9|Zürich 47.38 8.54 6|Geneva 46.20 6.14 7|Basel 47.56 7.59 8|Bern 46.95 7.45 7|Vienna 48.21 16.37 5|Graz 47.07 15.44 7
Salzburg 47.81 13.06 7|Innsbruck 47.27 11.39 7|Linz 48.31 14.29 8|Prague 50.08 14.44 5|Brno 49.20 16.61 7|Ostrava 49.82 18.26 7|Bratislava 48.15 17.11 7|Budapest 47.50 19.04 5
Warsaw 52.23 21.01 5|Kraków 50.06 19.94 6|Wrocław 51.11 17.04 6|Poznań 52.41 16.93 6|Gdańsk 54.35 18.65 6|Łódź 51.76 19.46 7|Szczecin 53.43 14.55 7|Lublin 51.25 22.57 7
Copenhagen 55.68 12.57 5|Aarhus 56.16 10.20 7|Oslo 59.91 10.75 5|Bergen 60.39 5.32 6|Trondheim 63.43 10.40 6|Stockholm 59.33 18.07 5|Gothenburg 57.71 11.97 6|Malmö 55.60 13.00 7
Helsinki 60.17 24.94 5|Tampere 61.50 23.76 7|Turku 60.45 22.27 7|Tallinn 59.44 24.75 6|Tartu 58.38 26.73 8|Riga 56.95 24.11 6|Vilnius 54.69 25.28 6|Kaunas 54.90 23.90 7
Klaipėda 55.70 21.14 7|Minsk 53.90 27.57 5|Gomel 52.42 31.01 7|Brest 52.10 23.73 7|Kyiv 50.45 30.52 5|Lviv 49.84 24.03 6|Odesa 46.48 30.73 6|Kharkiv 49.99 36.23 6|Dnipro 48.46 35.05 6
Chișinău 47.01 28.86 6|Bucharest 44.43 26.10 5|Cluj-Napoca 46.77 23.62 7|Timișoara 45.75 21.23 7|Sofia 42.70 23.32 5|Varna 43.21 27.91 7|Belgrade 44.79 20.45 5|Zagreb 45.81 15.98 6
Ljubljana 46.06 14.51 7|Sarajevo 43.86 18.41 6|Skopje 41.99 21.43 7|Tirana 41.33 19.82 6|Athens 37.98 23.73 5|Thessaloniki 40.64 22.94 6|Naples 40.85 14.27 6|Milan 45.46 9.19 5
Turin 45.07 7.69 6|Florence 43.77 11.26 7|Bologna 44.49 11.34 7|Venice 45.44 12.32 7|Palermo 38.12 13.36 6|Genoa 44.41 8.93 7|Bari 41.12 16.87 7|Izmir 38.42 27.14 6|Antalya 36.90 30.71 6
Saint Petersburg 59.93 30.34 5|Nizhny Novgorod 56.33 44.00 6|Kazan 55.80 49.11 5|Samara 53.20 50.15 6|Rostov-on-Don 47.24 39.71 6|Yekaterinburg 56.84 60.61 5|Novosibirsk 55.03 82.92 5
Krasnoyarsk 56.01 92.87 5|Irkutsk 52.29 104.28 5|Vladivostok 43.12 131.89 5|Khabarovsk 48.48 135.08 6|Reykjavík 64.15 -21.94 4|Anchorage 61.22 -149.90 4|Honolulu 21.31 -157.86 4
Winnipeg 49.90 -97.14 5|Calgary 51.05 -114.07 5|Minneapolis 44.98 -93.27 6|Phoenix 33.45 -112.07 5|Philadelphia 39.95 -75.17 7|Detroit 42.33 -83.05 6|New Orleans 29.95 -90.07 6
`;

let parsed: Name[] | null = null;

export function cities(): Name[] {
  parsed ??= ROWS.trim().split(/[|\n]/).map((row) => {
    const parts = row.trim().split(' ');
    const [zoom, longitude, latitude] = [Number(parts.pop()), Number(parts.pop()), Number(parts.pop())];
    return { text: parts.join(' '), x: xOf(longitude), y: yOf(latitude), zoom };
  }).sort((a, b) => a.zoom - b.zoom);
  return parsed;
}
