#include "step/jobs.h"

#include <algorithm>

#include "engine/walk.h"

namespace fusedopt {

// ---- layouts ------------------------------------------------------------------------------------

// The dimensions of more than one element, from the last one on.
static Layout dims_in_order(const View* views, int count) {
  Layout dims;
  for (int d = views[0].ndim - 1; d >= 0; --d) {
    if (views[0].shape[d] == 1) continue;
    Dim dim{views[0].shape[d], {}};
    for (int s = 0; s < count; ++s) dim.stride[s] = views[s].strides[d];
    if (views[0].second_strides) dim.stride[kSecond] = views[0].second_strides[d];
    dims.push_back(dim);
  }
  return dims;
}

// The same from the smallest stride of the first view on.
static Layout dims_by_stride(const View* views, int count) {
  Layout dims = dims_in_order(views, count);
  std::stable_sort(dims.begin(), dims.end(),
                   [](const Dim& a, const Dim& b) { return a.stride[0] < b.stride[0]; });
  return dims;
}

bool strided_overlaps_itself(const View& view) {
  if (view.numel <= 1) return false;
  const Layout dims = dims_by_stride(&view, 1);
  // No two can meet if each stride is longer than all that the smaller ones span.
  int64_t span = 0;
  bool nested = true;
  for (const Dim& dim : dims) {
    nested = nested && dim.stride[0] > span;
    span += (dim.size - 1) * dim.stride[0];
  }
  if (nested) return false;
  if (view.numel > span + 1) return true;
  // Strange strides: look at every place.
  std::vector<bool> taken(static_cast<size_t>(span) + 1);
  bool twice = false;
  walk(dims, 0, view.numel, [&](int64_t, const int64_t* offsets, int64_t run) {
    for (int64_t i = 0; i < run; ++i) {
      auto place = taken[offsets[0] + i * dims[0].stride[0]];
      twice = twice || place;
      place = true;
    }
  });
  return twice;
}

// One past the last byte.
static const char* end_of(const View& view) {
  if (view.contiguous || !view.numel) return view.data + view.numel * item_size(view.dtype);
  int64_t last = 0;
  for (int d = 0; d < view.ndim; ++d) last += (view.shape[d] - 1) * view.strides[d];
  return view.data + (last + 1) * item_size(view.dtype);
}

// Whether some bytes lie between the first and the last of both: if not, they share nothing.
static bool come_close(const View& a, const View& b) {
  return a.numel != 0 && b.numel != 0 && a.data < end_of(b) && b.data < end_of(a);
}

bool any_come_close(const View* views, int count) {
  const char* end[kMaxViews];
  for (int s = 0; s < count; ++s) {
    end[s] = end_of(views[s]);
    for (int other = 0; other < s; ++other) {
      if (views[s].data < end[other] && views[other].data < end[s]) return true;
    }
  }
  return false;
}

bool gradient_comes_close(const View* views, int count) {
  const View& grad = views[kGrad];
  const char* const end = end_of(grad);
  return std::any_of(views, views + count, [&](const View& view) {
    return &view != &grad && view.data < end && grad.data < end_of(view);
  });
}

bool overlap(const View& a, const View& b) {
  if (!come_close(a, b)) return false;
  if (a.contiguous && b.contiguous) return true;
  // Columns of one matrix lie between each other: look at every byte.
  std::vector<bool> taken(static_cast<size_t>(end_of(a) - a.data));
  const auto for_each_byte = [&](const View& view, auto f) {
    const Layout dims = dims_by_stride(&view, 1);
    const int64_t size = item_size(view.dtype);
    const ptrdiff_t start = view.data - a.data;
    walk(dims, 0, view.numel, [&](int64_t, const int64_t* offsets, int64_t run) {
      for (int64_t i = 0; i < run; ++i) {
        const int64_t at = start + (offsets[0] + i * dims[0].stride[0]) * size;
        for (int64_t byte = at; byte < at + size; ++byte) f(byte);
      }
    });
  };
  for_each_byte(a, [&](int64_t byte) { taken[static_cast<size_t>(byte)] = true; });
  bool shared = false;
  for_each_byte(b, [&](int64_t byte) {
    const bool inside = byte >= 0 && byte < static_cast<int64_t>(taken.size());
    shared = shared || (inside && taken[static_cast<size_t>(byte)]);
  });
  return shared;
}

bool overlap_out_of_step(const View& a, const View& b) {
  if (!come_close(a, b)) return false;
  return a.data != b.data || a.dtype != b.dtype ||
         !std::equal(a.strides, a.strides + a.ndim, b.strides);
}

// Whether each element has to be known by its place in the whole: by its random bits, or its block.
static bool are_numbered(const View* views, int count) {
  return std::any_of(views, views + count,
                     [](const View& view) { return takes_random_bits(view.dtype); });
}

Layout common_layout(const View* views, int count) {
  const bool are_arrays =
      std::all_of(views, views + count, [](const View& view) { return view.contiguous; });
  if (views[0].numel == 0 || are_arrays) return {};
  // The first view's own order in memory, so that its elements are visited consecutively.
  const Layout dims =
      are_numbered(views, count) ? dims_in_order(views, count) : dims_by_stride(views, count);
  const bool has_second = views[0].second_strides != nullptr;
  // Two dimensions that every stream walks as one become one.
  Layout merged;
  for (const Dim& dim : dims) {
    const bool joins = !merged.empty() && [&] {
      const Dim& inner = merged.back();
      for (int s = 0; s < count; ++s) {
        if (dim.stride[s] != inner.stride[s] * inner.size) return false;
      }
      return !has_second || dim.stride[kSecond] == inner.stride[kSecond] * inner.size;
    }();
    if (joins) {
      merged.back().size *= dim.size;
    } else {
      merged.push_back(dim);
    }
  }
  const auto unit = [&](const Dim& dim) {
    return std::all_of(dim.stride, dim.stride + count,
                       [](int64_t stride) { return stride == 1; }) &&
           (!has_second || dim.stride[kSecond] == 1);
  };
  if (merged.empty() || (merged.size() == 1 && unit(merged[0]))) return {};
  return merged;
}

// ---- jobs ---------------------------------------------------------------------------------------

static const Layout* kept(Layout layout, Layouts* layouts) {
  if (layout.empty()) return nullptr;
  layouts->push_back(std::move(layout));
  return &layouts->back();
}

void set_streams(const View* views, int count, Layouts* layouts, Job* job) {
  job->numel = views[kParam].numel;
  job->stream_count = count;
  job->bytes_per_element = 0;
  bool contiguous = true;
  for (int s = 0; s < count; ++s) {
    job->streams[s] = {views[s].data, views[s].dtype, views[s].second};
    job->bytes_per_element += item_size(views[s].dtype) + second_size(views[s].dtype);
    job->in_blocks = job->in_blocks || has_blocks(views[s].dtype);
    contiguous = contiguous && views[s].contiguous;
  }
  job->layout = job->grad_layout = nullptr;
  if (contiguous) return;
  job->layout = kept(common_layout(views, count), layouts);
  if (job->layout) job->grad_layout = kept(common_layout(&views[kGrad], 1), layouts);
}

Rows rows_of(const View& param) {
  int64_t length = 1;
  for (int d = 1; d < param.ndim; ++d) length *= param.shape[d];
  return {length};
}

bool join_master(const View& second, View* param) {
  const bool split = param->dtype == DType::bf16;
  if (second.dtype != (split ? DType::bf16_split : DType::f32)) return false;
  if (fault_of(*param, second) != Fault::none) return false;
  param->dtype = split ? DType::bf16_split : DType::f16_master;
  param->second = second.data;
  param->second_strides = second.strides;
  param->contiguous = param->contiguous && second.contiguous;
  return true;
}

bool join_scales(bool has_no_sign, const View& scale, const View& param, View* state) {
  if (scale.dtype != DType::e4m3 || !scale.contiguous || scale.ndim != 2 || param.ndim < 2 ||
      scale.shape[0] != param.shape[0] || scale.shape[1] != rows_of(param).blocks() ||
      scale.device != param.device) {
    return false;
  }
  state->dtype = has_no_sign ? DType::e5m3 : DType::e4m3;
  state->second = scale.data;
  return true;
}

void set_rule(const Rule& rule, const double* scalars, Job* job) {
  job->update = job->streams[kParam].dtype == DType::f64 ? rule.update_f64 : rule.update_f32;
  job->scalars = scalars;
  job->keeps = rule.keeps;
  job->ignores = rule.ignores;
}

void set_norm(const View& view, Layouts* layouts, Job* job) {
  const View views[] = {view, view};
  set_streams(views, 2, layouts, job);
}

bool walks(const Job& job, const View* views, int count) {
  if (job.layout || job.numel != views[kParam].numel || job.stream_count != count) {
    return false;
  }
  for (int s = 0; s < count; ++s) {
    const Stream& stream = job.streams[s];
    if (views[s].dtype != stream.dtype || views[s].second != stream.second) return false;
    if (s != kGrad && views[s].data != stream.data) return false;
  }
  return true;
}

}  // namespace fusedopt
