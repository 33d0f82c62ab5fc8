/* Decoding only the part of a JPEG that a crop needs, with libjpeg-turbo.
 *
 * Rows above the box skip the inverse transform, rows below it are not read, and columns beside it are left out; the
 * pixels inside are those of a whole decode, to the bit. Compiled on first use by data/images/jpeg.py.
 */
#include <setjmp.h>
#include <stdint.h>
#include <stdio.h>
#include <jpeglib.h>

#define MARGIN 2 /* pixels around the box that chroma upsampling looks at */
#define ROWS 4 /* a call */

struct failure {
  struct jpeg_error_mgr manager;
  jmp_buf jump;
};

static void leave(j_common_ptr common) { longjmp(((struct failure *)common->err)->jump, 1); }

static void count_only(j_common_ptr common, int level) {
  if (level < 0) common->err->num_warnings++;
}

static void begin(struct jpeg_decompress_struct *jpeg, const unsigned char *data, uint64_t size) {
  jpeg_create_decompress(jpeg);
  jpeg_mem_src(jpeg, data, size);
  jpeg_read_header(jpeg, TRUE);
}

static void prepare(struct jpeg_decompress_struct *jpeg, struct failure *failure) {
  jpeg->err = jpeg_std_error(&failure->manager);
  failure->manager.error_exit = leave;
  failure->manager.emit_message = count_only;
}

/* height * 65536 + width of a JPEG, or -1. */
int64_t sam_repro_jpeg_sides(const unsigned char *data, uint64_t size) {
  struct jpeg_decompress_struct jpeg;
  struct failure failure;
  prepare(&jpeg, &failure);
  if (setjmp(failure.jump)) {
    jpeg_destroy_decompress(&jpeg);
    return -1;
  }
  begin(&jpeg, data, size);
  int64_t sides = (int64_t)jpeg.image_height * 65536 + jpeg.image_width;
  jpeg_destroy_decompress(&jpeg);
  return sides;
}

/* Decode the box of h x w pixels at (top, left) of a JPEG of height x width pixels, as RGB.
 *
 * out has room for 3 * height * width bytes. It gets rows of `columns` pixels, of which row r is the image's row r
 * from column x on; only the box is filled. Returns x * 65536 + columns, or -1 on any error, warning or other sides.
 */
int64_t sam_repro_jpeg_box(const unsigned char *data, uint64_t size, int64_t height, int64_t width, int64_t top,
                           int64_t left, int64_t h, int64_t w, unsigned char *out) {
  struct jpeg_decompress_struct jpeg;
  struct failure failure;
  prepare(&jpeg, &failure);
  if (setjmp(failure.jump)) {
    jpeg_destroy_decompress(&jpeg);
    return -1;
  }
  begin(&jpeg, data, size);
  jpeg.out_color_space = JCS_RGB;
  if (jpeg.image_height != height || jpeg.image_width != width) leave((j_common_ptr)&jpeg);
  jpeg_start_decompress(&jpeg);
  int64_t begin_row = top > MARGIN ? top - MARGIN : 0, end_row = top + h + MARGIN;
  int64_t begin_column = left > MARGIN ? left - MARGIN : 0, end_column = left + w + MARGIN;
  if (end_row > height) end_row = height;
  if (end_column > width) end_column = width;
  JDIMENSION x = begin_column, columns = end_column - begin_column;
  if (columns < width) jpeg_crop_scanline(&jpeg, &x, &columns);
  if (begin_row) jpeg_skip_scanlines(&jpeg, begin_row);
  while (jpeg.output_scanline < end_row) {
    JSAMPROW rows[ROWS];
    JDIMENSION count = 0;
    for (; count < ROWS && jpeg.output_scanline + count < end_row; count++)
      rows[count] = out + 3 * (size_t)columns * (jpeg.output_scanline + count);
    jpeg_read_scanlines(&jpeg, rows, count);
  }
  long warnings = jpeg.err->num_warnings;
  jpeg_destroy_decompress(&jpeg);
  return warnings ? -1 : (int64_t)x * 65536 + columns;
}
